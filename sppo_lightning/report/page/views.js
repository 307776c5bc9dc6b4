// The parts of the page that show a run's numbers.

const lastOf = (list) => list[list.length - 1];
const hasMeasure = (run, name) => run.held_out.some((one) => one.measures[name]);
const measureNames = (runs) => Object.keys(DATA.measures).filter((name) => runs.some((run) => hasMeasure(run, name)));

function figure(title, about, fill, hint = null) {
  const node = el("figure", { class: "chart" }, el("figcaption", {}, el("strong", { title: hint }, title), about ? el("span", {}, about) : null));
  const plot = el("div", { class: "plot-area" });
  node.append(plot);
  CHARTS.push(() => fill(plot));
  return node;
}

const sectionOf = (id, title, about, ...nodes) => el("section", { id, class: "part" }, el("h2", {}, title), about ? el("p", { class: "about" }, about) : null, ...nodes);
const ofRun = (title, run, only) => (only ? title : [title, el("span", { class: "of" }, inLine(run.name))]);
const unitLabel = (unit) => (unit === "share" ? "" : unit);

// ------------------------------------------------------------ held-out prompts

function heldOutPart(runs) {
  if (!runs.some((run) => run.held_out.length)) return null;
  const names = runs.map((run) => run.name);
  const shown = measureNames(runs).filter((name) => name !== "gain" && DATA.measures[name]);
  const charts = shown.map((name) => {
    const measure = DATA.measures[name];
    const series = runs.map((run) => {
      const points = run.held_out.filter((one) => one.measures[name]?.mean !== null && one.measures[name]);
      const estimates = points.map((one) => one.measures[name]);
      return {
        name: run.name,
        x: points.map((one) => one.finished),
        y: estimates.map((one) => one.mean),
        error: estimates.map((one) => (one.stderr === null ? 0 : DATA.interval * one.stderr)),
      };
    });
    const unit = unitLabel(measure.unit);
    return figure(measure.title, unit && unit !== "reward" ? unit : null, (node) =>
      lineChart(node, { title: measure.title, unit: measure.unit, xTitle: "iterations finished", series, wholeX: true, base: name.includes("win_rate") ? 0.5 : null, xFormat: (value) => (value === 0 ? "initial" : String(value)) }),
      measure.about,
    );
  });
  const rows = runs.flatMap((run) =>
    run.held_out.map((one) => [
      ...(runs.length > 1 ? [inLine(run.name)] : []),
      policyName(one.finished),
      ...measureNames(runs).map((name) => withInterval(one.measures[name], DATA.measures[name].unit, { sign: name === "gain" })),
      percent(one.unfinished),
      percent(one.failed),
    ]),
  );
  const heads = [...(runs.length > 1 ? ["run"] : []), "policy", ...measureNames(runs).map((name) => DATA.measures[name].title), "cut off", "failed"];
  return sectionOf(
    "held-out",
    "Held-out prompts",
    `Greedy answers to ${whole(runs[0].held_out_prompts)} prompts that are not trained on. Bars and ± are 95 % intervals over prompts (${DATA.interval} standard errors).`,
    legend(names, true),
    el("div", { class: "charts four" }, ...charts),
    el("details", {}, el("summary", {}, "As a table"), tableOf(heads, rows)),
  );
}

// ------------------------------------------------------------ difficulty and selection

function difficultyPart(run, only) {
  const nodes = [];
  const { difficulty, moves, gain_by_quartile: gains } = run;
  if (difficulty) {
    const numbers = Object.keys(difficulty.selected).map(Number);
    const most = Math.max(...numbers.flatMap((one) => difficulty.selected[one].map((count, place) => count + difficulty.others[one][place])));
    nodes.push(
      el("h3", {}, "Prompts by difficulty"),
      el("ul", { class: "legend" }, el("li", {}, el("span", { class: "swatch filled" }), "selected to train on"), el("li", {}, el("span", { class: "swatch hatched" }), "not selected")),
      el(
        "div",
        { class: "charts" },
        ...numbers.map((one) =>
          figure(`Iteration ${one}`, "prompts", (node) =>
            histogramChart(node, { title: `Iteration ${one}: prompts by difficulty`, edges: difficulty.edges, selected: difficulty.selected[one], others: difficulty.others[one], most, xTitle: "difficulty (mean reward; low is hard)" }),
          ),
        ),
      ),
    );
  }
  const pair = el("div", { class: "columns" });
  if (moves.length) pair.append(movesTable(moves));
  if (gains) pair.append(gainChart(gains));
  if (pair.childElementCount) nodes.push(pair);
  if (run.iterations.length) nodes.push(outcomeTable(run));
  if (!nodes.length) return null;
  return sectionOf(
    `difficulty-${DATA.runs.indexOf(run)}`,
    ofRun("Difficulty and selection", run, only),
    "Difficulty is a prompt's mean reward over sampled responses: the lower, the harder.",
    ...nodes,
  );
}

function movesTable(moves) {
  const node = el("div", {}, el("h3", {}, "Moves between difficulty quartiles"));
  const choice = el("select", { "aria-label": "Iterations" }, ...moves.map((one, place) => el("option", { value: place, selected: place === moves.length - 1 }, `iteration ${one.before} → ${one.after}`)));
  const table = el("div", {});
  const update = () => {
    const { before, after, counts } = moves[choice.value];
    const heads = [`from ↓ to →`, ...DATA.quartiles];
    const rows = counts.map((line, place) => {
      const sum = line.reduce((total, one) => total + one, 0);
      const cells = line.map((count, column) => el("span", { class: `cell ${column === place ? "stays" : ""}`, "--share": String(sum ? count / sum : 0) }, whole(count)));
      return [DATA.quartiles[place], ...cells];
    });
    table.replaceChildren(tableOf(heads, rows, { className: "matrix", caption: `Prompts by quartile in iteration ${before} (rows) and ${after} (columns); darker: a larger share of the row. Ties share a quartile, so quartiles may differ in size.` }));
  };
  choice.addEventListener("change", update);
  update();
  node.append(choice, table);
  return node;
}

function gainChart({ before, after, gains }) {
  const node = el("div", {}, el("h3", {}, "Gain by difficulty quartile"));
  const known = gains.map((gain, place) => ({ gain, place })).filter(({ gain }) => gain.mean !== null);
  const series = [{ name: "gain", x: known.map(({ place }) => place), y: known.map(({ gain }) => gain.mean), error: known.map(({ gain }) => (gain.stderr === null ? 0 : DATA.interval * gain.stderr)) }];
  node.append(
    figure(`Reward, iteration ${after} less iteration ${before}`, null, (plot) =>
      lineChart(plot, { title: "Gain by difficulty quartile", unit: "reward", xTitle: "quartile of the prompts", series, wholeX: true, zero: true, xFormat: (value) => DATA.quartiles[value] ?? "" }),
    ),
    el("p", { class: "note" }, `Ordered by half of the first responses, measured on the other half, so that chance alone shows no gain. Prompts: ${gains.map((gain) => whole(gain.size)).join(", ")}.`),
  );
  return node;
}

function outcomeTable(run) {
  const names = [...new Set(run.iterations.flatMap((one) => Object.keys(one.outcomes)))];
  const rows = run.iterations.map((one) => {
    const total = Object.values(one.outcomes).reduce((sum, count) => sum + count, 0);
    return [`iteration ${one.iteration}${one.complete ? "" : " (in progress)"}`, ...names.map((name) => barCell(one.outcomes[name] ?? 0, total))];
  });
  return el("div", {}, el("h3", {}, "What became of the prompts"), tableOf(["", ...names.map((name) => outcomeName(inLine(name)))], rows, { className: "bars" }));
}

const barCell = (count, total) => el("span", { class: "bar", "--share": String(total ? count / total : 0) }, whole(count));

// ------------------------------------------------------------ training

const CURVES = [
  ["Loss", [["loss", "loss"]]],
  ["Reward margin", [["rewards/margin", "chosen less rejected"]]],
  ["Reward accuracy", [["rewards/accuracy", "share of pairs"]], "share"],
  ["Log-ratios to the reference", [["logratios/chosen", "chosen"], ["logratios/rejected", "rejected"]], "nat"],
  ["Learning rate", [["lr", "learning rate"]], "", "exact"],
];

function trainingPart(runs) {
  if (!runs.some((run) => Object.keys(run.curves).length)) return null;
  const used = new Set(CURVES.flatMap(([, curves]) => curves.map(([name]) => name)));
  const others = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))].filter((name) => !used.has(name)).sort();
  const chart = ([title, curves, unit, exact]) => {
    const series = runs.flatMap((run) =>
      curves.filter(([name]) => run.curves[name]?.[0].length).map(([name, label]) => ({ name: runs.length > 1 ? (curves.length > 1 ? `${run.name}, ${label}` : run.name) : label, x: run.curves[name][0], y: run.curves[name][1] })),
    );
    if (!series.length) return null;
    const marks = runs.length === 1 ? Object.values(runs[0].iteration_steps).filter((step) => step > 0) : [];
    const node = figure(title, unit === "nat" ? "nat per response" : null, (plot) => lineChart(plot, { title, unit: unit ?? "", xTitle: "optimizer step", series, marks, smooth: !exact }));
    if (curves.length > 1) node.querySelector("figcaption").append(legend(series.map((one) => one.name), false));
    return node;
  };
  const more = el("details", {}, el("summary", {}, `${others.length} other metrics`));
  more.addEventListener(
    "toggle",
    () => {
      more.append(el("div", { class: "charts" }, ...others.map((name) => chart([inLine(name), [[name, name]]])).filter(Boolean)));
      drawCharts();
    },
    { once: true },
  );
  const about = ["Thick lines are running means.", runs.length === 1 ? "Dotted lines: an iteration begins." : "", "Drag to zoom, double-click to zoom out."];
  return sectionOf(
    "training",
    "Training",
    about.filter(Boolean).join(" "),
    legend(runs.map((run) => run.name), false),
    el("div", { class: "charts" }, ...CURVES.map(chart).filter(Boolean)),
    others.length ? more : null,
  );
}

// ------------------------------------------------------------ the gate

const ACTIONS = { accept: "✓ accepted", warn: "! warned", stop: "■ stopped", revert: "↶ reverted" };

function gatePart(run, only) {
  if (!run.decisions.length) return null;
  const rows = run.decisions.map((one) => [
    policyName(one.finished),
    ACTIONS[one.action] ?? inLine(one.action),
    withInterval({ mean: one.difference, stderr: one.stderr }, "reward", { sign: true }),
    policyName(one.best),
    `× ${one.learning_rate_factor}`,
    inLine(one.reasons.join("; ")) || NONE,
  ]);
  return sectionOf(
    `gate-${DATA.runs.indexOf(run)}`,
    ofRun("Decisions of the gate", run, only),
    null,
    tableOf(["policy", "decision", "reward, less the best before", "best so far", "learning rate", "reasons"], rows),
  );
}

// ------------------------------------------------------------ time and tokens

function timePart(run, only) {
  if (!run.phases.length) return null;
  const iterations = [...new Set(run.phases.map((one) => one.iteration))];
  const names = [...new Set(run.phases.map((one) => one.phase))];
  const sum = (phases, key) => (phases.some((one) => one[key] !== null) ? phases.reduce((total, one) => total + (one[key] ?? 0), 0) : null);
  const total = sum(run.phases, "seconds");
  const line = (name, phases) => {
    const [seconds, tokens] = [sum(phases, "seconds"), sum(phases, "tokens")];
    return [
      name,
      ...iterations.map((iteration) => duration(sum(phases.filter((one) => one.iteration === iteration), "seconds"))),
      total && seconds !== null ? el("span", { class: "bar", "--share": String(seconds / total) }, `${duration(seconds)} (${Math.round((100 * seconds) / total)} %)`) : duration(seconds),
      whole(tokens),
      tokens && seconds ? number(tokens / seconds, 1) : NONE,
    ];
  };
  const rows = names.map((name) => line(name, run.phases.filter((one) => one.phase === name)));
  rows.push(line("all", run.phases));
  rows.at(-1)[iterations.length + 2] = rows.at(-1)[iterations.length + 3] = NONE;
  return sectionOf(
    `time-${DATA.runs.indexOf(run)}`,
    ofRun("Time and tokens", run, only),
    "Wall time of the first process. Tokens sampled; of reference and training, tokens of prompts and pairs that are read.",
    tableOf(["phase", ...iterations.map((one) => `iteration ${one}`), "all", "tokens", "tokens/s"], rows, { className: "bars" }),
  );
}
