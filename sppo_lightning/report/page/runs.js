// What was run: the head of the page, runs against each other, settings, prompts.

function runTime(run) {
  const known = run.phases.filter((one) => one.seconds !== null);
  return known.length ? known.reduce((sum, one) => sum + one.seconds, 0) : null;
}

function state(run) {
  if (run.planned === null) return `${run.finished} iterations finished`;
  if (run.finished >= run.planned) return `finished, ${run.planned} iteration${run.planned === 1 ? "" : "s"}`;
  return `not finished: ${run.finished} of ${run.planned} iterations`;
}

// The policy that the run has now: after a step back that was reverted, an earlier one.
const standing = (run) => lastOf(run.decisions)?.policy ?? lastOf(run.held_out)?.finished;

// A name of the hub as it is; of a folder the last part.
function modelName(run) {
  const given = run.settings["model.policy.pretrained"];
  if (!given) return null;
  return inLine(/^[^./…][^/]*\/[^/]+$/u.test(given) ? given : given.split("/").filter(Boolean).at(-1));
}

function headOf(run) {
  const start = run.starts[0];
  const devices = start ? `${start.processes > 1 ? `${start.processes} × ` : ""}${inLine(start.device)}` : null;
  const facts = [
    state(run),
    run.seed === null ? null : `seed ${run.seed}`,
    modelName(run),
    devices,
    start ? `started ${inLine(start.time)}` : null,
  ];
  return el("p", { class: "facts" }, el("bdi", {}, facts.filter(Boolean).join(" · ")));
}

function tile(title, value, about) {
  return el("div", { class: "tile" }, el("dt", {}, title), el("dd", {}, el("strong", {}, value), about ? el("span", {}, about) : null));
}

function tiles(run) {
  const first = run.held_out.find((one) => one.finished === 0)?.measures;
  const now = run.held_out.find((one) => one.finished === standing(run))?.measures;
  const nodes = [];
  const change = (name, digits) => (first && now && first !== now ? `${number(first[name]?.mean, digits)} → ${number(now[name]?.mean, digits)}` : number((now ?? first)?.[name]?.mean, digits));
  if (now) {
    nodes.push(tile("Held-out reward", change("reward", 3), now.gain ? `${withInterval(now.gain, "reward", { sign: true })} over the initial policy` : null));
    for (const name of Object.keys(DATA.measures).filter((one) => one.includes("win_rate") && now[one]))
      nodes.push(tile(DATA.measures[name].title, withInterval(now[name], "share"), "against the initial policy"));
    if (now.kl) nodes.push(tile("KL", withInterval(now.kl, "nat per token"), "nat per token, from the initial policy"));
    nodes.push(tile("Length", change("length", 1), "tokens of an answer"));
  }
  const seconds = runTime(run);
  const sampled = run.phases.filter((one) => ["probing", "generating", "evaluating"].includes(one.phase)).reduce((sum, one) => sum + (one.tokens ?? 0), 0);
  if (seconds !== null) nodes.push(tile("Time", duration(seconds), sampled ? `${whole(sampled)} tokens sampled` : null));
  return nodes.length ? el("dl", { class: "tiles" }, ...nodes) : null;
}

function missingPart(runs, study) {
  const texts = study ? [...study.missing] : [];
  texts.push(...runs.flatMap((run) => run.missing.map((text) => (runs.length > 1 ? `${run.name}: ${text}` : text))));
  texts.push(...PROMPTS.left_out.map((text) => `${text} are left out, so that the file stays within its size (--max_megabytes).`));
  if (!texts.length) return null;
  const list = el("ul", {}, ...texts.slice(0, 200).map((text) => el("li", {}, el("bdi", {}, inLine(text)))));
  return el("details", { class: "missing", open: texts.length <= 3 }, el("summary", {}, `${texts.length} thing${texts.length === 1 ? " is" : "s are"} missing or left out`), list);
}

// ------------------------------------------------------------ runs against each other

function comparisonPart(runs) {
  if (!DATA.comparison) return null;
  const { differences, settings } = DATA.comparison;
  const overview = tableOf(
    ["run", "state", "seed", "held-out reward", "gain", "win rate", "time"],
    runs.map((run) => {
      const now = run.held_out.find((one) => one.finished === standing(run))?.measures ?? {};
      return [inLine(run.name), state(run), String(run.seed ?? NONE), withInterval(now.reward, "reward"), withInterval(now.gain, "reward", { sign: true }), withInterval(now.win_rate, "share"), duration(runTime(run))];
    }),
  );
  const paired = tableOf(
    ["run", "policy", "reward", "win rate", "tokens"],
    differences.map((one) => [inLine(runs[one.run].name), policyName(one.finished), withInterval(one.reward, "reward", { sign: true }), withInterval(one.win_rate, "share"), withInterval(one.length, "tokens", { sign: true })]),
    { caption: `Less ${inLine(runs[0].name)}'s after as many iterations, prompt by prompt on the same held-out prompts; ± is a 95 % interval.` },
  );
  const different = Object.entries(settings).map(([key, values]) => [inLine(key), ...values.map((value) => el("bdi", {}, value === null ? NONE : inLine(value)))]);
  return sectionOf(
    "runs",
    "Runs",
    null,
    overview,
    el("h3", {}, `Paired differences to ${inLine(runs[0].name)}`),
    differences.length ? paired : el("p", { class: "nothing" }, "There are no held-out answers to compare yet."),
    el("h3", {}, "Settings that differ"),
    different.length ? tableOf(["setting", ...runs.map((run) => inLine(run.name))], different) : el("p", { class: "nothing" }, "None."),
  );
}

// ------------------------------------------------------------ prompts

function promptsPart(runs, sheet) {
  if (!PROMPTS.prompt.length) return null;
  const several = runs.length > 1;
  const column = (name, title, about, digits = 3, minor = false) => ({ title, about, numeric: true, minor, cell: (row) => number(PROMPTS[name][row], digits), key: (row) => PROMPTS[name][row] });
  const columns = [
    ...(several ? [{ title: "run", cell: (row) => inLine(runs[PROMPTS.run[row]].name), key: (row) => PROMPTS.run[row], minor: true }] : []),
    { title: "it.", width: "3.2rem", about: "iteration", numeric: true, cell: (row) => String(PROMPTS.iteration[row]), key: (row) => PROMPTS.iteration[row] },
    { title: "prompt", wide: true, cell: (row) => PROMPTS.line(PROMPTS.prompt[row]), key: (row) => PROMPTS.line(PROMPTS.prompt[row]) },
    ...(PROMPTS.categories ? [{ title: "category", minor: true, width: "8rem", cell: (row) => inLine(PROMPTS.categories[PROMPTS.prompt[row]] ?? NONE), key: (row) => PROMPTS.categories[PROMPTS.prompt[row]] }] : []),
    { title: "outcome", minor: true, width: "10.8rem", cell: (row) => outcomeName(inLine(PROMPTS.outcomes[PROMPTS.outcome[row]])), key: (row) => outcomeName(PROMPTS.outcomes[PROMPTS.outcome[row]]) },
    column("difficulty", "difficulty", "mean reward that the selection saw; low is hard"),
    column("reward", "reward", "mean over all responses", 3, true),
    column("spread", "spread", "standard deviation of the rewards", 3, true),
    { ...column("gain", "gain", "mean reward, less that of the prompt's first iteration"), cell: (row) => signed(number(PROMPTS.gain[row])) },
    column("gap", "gap", "reward of chosen less rejected", 3, true),
    column("length", "tokens", "mean tokens of a response", 1, true),
  ];
  const table = new RowTable(columns, { label: "Prompts by iteration", open: (place) => sheet.open(table, place, fillPrompt), empty: "No prompt matches." });
  const all = ["", "all"];
  const choices = [
    ...(several ? [{ label: "run", options: [all, ...runs.map((run, place) => [place, run.name])], keep: (row, value) => PROMPTS.run[row] === Number(value) }] : []),
    { label: "iteration", options: [all, ...[...new Set(PROMPTS.iteration)].sort((a, b) => a - b).map((one) => [one, `${one}`])], keep: (row, value) => PROMPTS.iteration[row] === Number(value) },
    { label: "outcome", options: [all, ...PROMPTS.outcomes.map((name, place) => [place, outcomeName(name)])], keep: (row, value) => PROMPTS.outcome[row] === Number(value) },
    ...(PROMPTS.categories ? [{ label: "category", options: [all, ...[...new Set(PROMPTS.categories.filter((one) => one !== null))].sort().map((one) => [one, one])], keep: (row, value) => PROMPTS.categories[PROMPTS.prompt[row]] === value }] : []),
    { label: "gain", options: [all, ["1", "gained"], ["-1", "lost"], ["0", "unchanged"]], keep: (row, value) => PROMPTS.gain[row] !== null && Math.sign(PROMPTS.gain[row]) === Number(value) },
  ];
  const everything = PROMPTS.prompt.map((_, row) => row);
  const narrow = (words, values) => {
    const found = words.length ? PROMPTS.ids.map((_, prompt) => words.every((word) => PROMPTS.searched(prompt).includes(word))) : null;
    const kept = choices.map(({ keep }, place) => [keep, values[place]]).filter(([, value]) => value !== "");
    return everything.filter((row) => (!found || found[PROMPTS.prompt[row]]) && kept.every(([keep, value]) => keep(row, value)));
  };
  const part = sectionOf("prompts", "Prompts and responses", "Every training prompt in every iteration. A row opens to all its sampled responses; chosen and rejected ones are marked.");
  LATER.push(() => part.append(filters(choices, narrow, table, everything.length), table.node), () => table.render());
  return part;
}

function answersPart(runs, sheet) {
  const evaluations = PROMPTS.held_out.flat();
  if (!evaluations.length) return null;
  const ofRun = PROMPTS.held_out.map((list, run) => {
    const rewards = (one) => new Map(one ? one.prompt.map((prompt, place) => [prompt, one.reward[place]]) : []);
    return { first: rewards(list[0]), last: rewards(list.find((one) => one.finished === standing(runs[run])) ?? lastOf(list)) };
  });
  const base = ofRun.find((one) => one.first.size);
  const rows = [...new Set(evaluations.flatMap((one) => one.prompt))];
  const less = (a, b) => (a === null || a === undefined || b === null || b === undefined ? null : a - b);
  const numeric = (title, about, key, sign) => ({ title, about, numeric: true, key, cell: (row) => (sign ? signed(number(key(row))) : number(key(row))) });
  const columns = [
    { title: "prompt", wide: true, cell: (row) => PROMPTS.line(row), key: (row) => PROMPTS.line(row) },
    numeric("before", "reward of the initial policy's answer", (row) => base.first.get(row)),
    ...(runs.length > 1
      ? ofRun.map(({ last }, run) => numeric(inLine(runs[run].name), "reward of this run's answer", (row) => last.get(row)))
      : [numeric("after", "reward of the last policy's answer", (row) => base.last.get(row)), numeric("gain", "after less before", (row) => less(base.last.get(row), base.first.get(row)), true)]),
    ...(runs.length > 1 ? [numeric("difference", "the last run less the first", (row) => less(lastOf(ofRun).last.get(row), ofRun[0].last.get(row)), true)] : []),
  ];
  const table = new RowTable(columns, { label: "Held-out prompts", open: (place) => sheet.open(table, place, fillHeldOut), empty: "No prompt matches." });
  const score = columns.at(-1).key;
  const choices = [{ label: runs.length > 1 ? "difference" : "gain", options: [["", "all"], ["1", "gained"], ["-1", "lost"], ["0", "unchanged"]] }];
  const narrow = (words, [value]) =>
    rows.filter((row) => words.every((word) => PROMPTS.searched(row).includes(word)) && (value === "" || (score(row) !== null && Math.sign(score(row)) === Number(value))));
  const part = sectionOf("answers", "Held-out answers", "A row opens to the answers before and after, side by side, with the words that changed.");
  LATER.push(() => part.append(filters(choices, narrow, table, rows.length), table.node), () => table.render());
  return part;
}

// ------------------------------------------------------------ settings

function settingsPart(runs) {
  if (!runs.length) return null;
  const nodes = runs.flatMap((run) => {
    const settings = Object.entries(run.settings).map(([key, value]) => [inLine(key), el("bdi", {}, value === null ? NONE : inLine(value))]);
    const starts = run.starts.map((start) => [inLine(start.time), whole(start.step), `${start.processes} × ${inLine(start.device)}`, inLine(start.system), inLine(Object.entries(start.versions ?? {}).map(([name, version]) => `${name} ${version}`).join(", "))]);
    return [
      runs.length > 1 ? el("h3", {}, inLine(run.name)) : null,
      starts.length ? tableOf(["started", "at step", "device", "system", "versions"], starts) : el("p", { class: "nothing" }, "Versions and device were not recorded."),
      settings.length ? el("details", {}, el("summary", {}, `${settings.length} settings`), tableOf(["setting", "value"], settings, { className: "settings" })) : null,
    ];
  });
  return sectionOf("settings", "What was run", null, ...nodes.filter(Boolean));
}
