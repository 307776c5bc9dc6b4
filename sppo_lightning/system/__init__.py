"""What a run asks of its machine: whole-or-absent files, a lock, signals, processes, servers, device memory.

Knows nothing of prompts, models or training; imports ``types`` alone.

- A file is written under a temporary name, fsynced and renamed (``durable``).
- Between two training phases the processes of a run meet through files in ``.rendezvous/<session>/``, never in a
  collective: nobody times out while another makes data (``rendezvous``). Each has a heartbeat. One that fails leaves
  its reason, which ends the others at their next barrier or between two answers; one that is silent for five minutes
  ends them too.
- SIGTERM, Ctrl-C and SLURM's SIGUSR1 end a run at once while nothing but the store changes; while training, the step
  under way is finished and saved first, on all processes (``signals``). Lightning's own handlers are replaced: its
  one for SIGTERM waits for the other processes inside the handler.
"""
