// A study: what its arms gained, what became of its claims, and which of its runs follow.

function studyFacts({ runs, settings }) {
  const arms = new Set(settings.flatMap((one) => one.arms.map((arm) => arm.arm))).size;
  const failed = runs.failed ? `, ${runs.failed} failed` : "";
  return el("p", { class: "facts" }, `study · ${arms} arms with results · ${runs.ended} of ${runs.all} runs have ended${failed}`);
}

function between(mean, low, high) {
  const text = (value) => signed(number(value));
  return low === null || high === null ? text(mean) : `${text(mean)} [${text(low)}, ${text(high)}]`;
}

// An arm's gain on a line that all arms of a setting share: interval, mean, each seed, and where nothing is gained.
function strip({ gain, low, high, gains }, [from, to]) {
  const place = (value) => 6 + (208 * (value - from)) / (to - from || 1);
  const tick = (value, className, reach) => svg("line", { class: className, x1: place(value), x2: place(value), y1: 10 - reach, y2: 10 + reach });
  const node = svg("svg", { class: "strip", width: 220, height: 20, viewBox: "0 0 220 20", "aria-hidden": "true" }, tick(0, "zero", 10));
  node.append(...gains.filter((value) => value !== null).map((value) => tick(value, "seed", 5)));
  if (low !== null && high !== null) node.append(svg("line", { class: "interval", x1: place(low), x2: place(high), y1: 10, y2: 10 }));
  if (gain !== null) node.append(svg("circle", { cx: place(gain), cy: 10, r: 4 }));
  return node;
}

function armTable({ name, arms }) {
  const values = arms.flatMap((arm) => [arm.gain, arm.low, arm.high, ...arm.gains]).filter((value) => value !== null);
  const range = [Math.min(0, ...values), Math.max(0, ...values)];
  const rows = arms.map((arm) => [
    el("bdi", {}, inLine(arm.title)),
    strip(arm, range),
    between(arm.gain, arm.low, arm.high),
    whole(arm.seeds),
    signed(number(arm.lowest_gain)),
    percent(arm.win_rate),
    number(arm.length_ratio, 2),
    whole(arm.pairs),
    whole(arm.tokens),
    whole(arm.reverted),
  ]);
  const heads = ["arm", el("span", { class: "ends" }, el("span", {}, number(range[0])), el("span", {}, number(range[1]))), "gain", "seeds", "lowest", "win rate", "length", "pairs", "tokens", "reverted"];
  const caption = `Gain: held-out reward of the policy that a run ended with less the initial policy's (${number(arms[0].initial)}), over ${whole(arms[0].prompts)} prompts, with its 95 % interval. Dot: mean; line: interval; ticks: seeds; dotted: no gain. Lowest: mean gain after any iteration. Length: of the answers, over the initial ones'.`;
  return el("div", {}, el("h3", {}, el("bdi", {}, inLine(name))), tableOf(heads, rows, { caption, className: "arms" }));
}

function gainsByIteration({ name, arms }) {
  const series = arms.map((arm) => {
    const points = Object.entries(arm.by_iteration).filter(([, gain]) => gain !== null);
    return { name: arm.title, x: points.map(([finished]) => Number(finished)), y: points.map(([, gain]) => gain) };
  });
  if (!series.some((one) => one.x.length > 1)) return null;
  return el(
    "div",
    { class: "by-iteration" },
    legend(series.map((one) => one.name), true),
    figure("Gain after each iteration", "mean over seeds", (node) =>
      lineChart(node, { title: `${name}: gain after each iteration`, unit: "reward", xTitle: "iterations finished", series, wholeX: true, base: 0, xFormat: (value) => (value === 0 ? "initial" : String(value)) }),
    ),
  );
}

function claimTable(claims) {
  const rows = claims.map((one) => [
    el("bdi", {}, inLine(one.text)),
    inLine(one.setting),
    one.reading,
    between(one.mean, one.low, one.high),
    one.effect === null ? NONE : signed(number(one.effect, 2)),
    number(one.p_holm),
    el("strong", {}, inLine(one.verdict)),
  ]);
  return tableOf(["claim", "setting", "reading", "difference", "effect size", "p", "verdict"], rows, {
    caption: "Paired by seed and prompt, with 95 % intervals. Effect size: Cohen's d for paired samples. p is two-sided and corrected for the claims and settings of a reading (Holm).",
    className: "claims",
  });
}

function studyPart(study) {
  if (!study) return null;
  const follow = study.shown
    ? `Below: the runs of ${inLine(study.shown)}, one for each arm.${study.left_out ? ` Left out: ${whole(study.left_out)} that have ended; sppo-lightning report shows those of the folders below runs/ that it is given.` : ""}`
    : "No run has ended yet.";
  const limits = study.limits.length ? [el("h3", {}, "What this cannot say"), el("ul", {}, ...study.limits.map((text) => el("li", {}, el("bdi", {}, inLine(text)))))] : [];
  return sectionOf(
    "study",
    "Study",
    el("bdi", {}, inLine(study.question)),
    ...study.settings.flatMap((setting) => [armTable(setting), gainsByIteration(setting)]).filter(Boolean),
    ...(study.claims.length ? [el("h3", {}, "Claims"), claimTable(study.claims)] : []),
    ...limits,
    el("p", { class: "note" }, `Arms, claims, seeds and configs were written down before the first run (study.json, digest ${inLine(study.digest)}). README.md in the study's folder has more tables. ${follow}`),
  );
}
