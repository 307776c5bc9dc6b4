// Opens the data and puts the page together.

let DATA;
let PROMPTS;
const CHARTS = []; // draw what is drawn once its place in the page is known
const LATER = []; // what needs no waiting for

function drawCharts() {
  for (const fill of CHARTS.splice(0)) fill();
}

// The table of prompts with what is asked of it over and over.
function indexed(table) {
  const lines = [];
  const searched = [];
  let rows;
  return {
    ...table,
    line: (prompt) => (lines[prompt] ??= inLine(table.prompts[prompt] || table.ids[prompt])),
    searched: (prompt) => (searched[prompt] ??= `${table.ids[prompt]} ${table.prompts[prompt]}`.toLowerCase()),
    ofPrompt(prompt) {
      rows ??= Map.groupBy ? Map.groupBy(table.prompt.keys(), (row) => table.prompt[row]) : grouped(table.prompt);
      const place = (row) => table.run[row] * 1e6 + table.iteration[row];
      return [...rows.get(prompt)].sort((one, other) => place(one) - place(other));
    },
  };
}

function grouped(prompts) {
  const found = new Map();
  prompts.forEach((prompt, row) => found.set(prompt, [...(found.get(prompt) ?? []), row]));
  return found;
}

function navigation(main) {
  const parts = new Map(); // of several runs' parts that say the same of each, the first one
  for (const part of main.querySelectorAll("section.part")) {
    const title = part.querySelector("h2").firstChild.textContent;
    if (!parts.has(title)) parts.set(title, part.id);
  }
  const links = [...parts].map(([title, id]) => el("li", {}, el("a", { href: `#${id}` }, title)));
  return el("nav", { class: "contents", "aria-label": "Contents" }, el("ul", {}, ...links));
}

async function start() {
  const page = document.getElementById("report");
  const status = document.getElementById("state");
  const say = (text) => {
    status.textContent = text;
    status.className = "trouble";
  };
  if (typeof DecompressionStream === "undefined") {
    say("This browser cannot open compressed data (DecompressionStream), which this report needs: use a newer one (Chrome 80, Safari 16.4, Firefox 113). The numbers are also there as text: sppo-lightning report RUN --format md");
    return;
  }
  try {
    [DATA, PROMPTS] = await Promise.all([unpack("summary"), unpack("prompts").then(indexed)]);
  } catch (error) {
    say(`This report cannot be opened: its data is damaged, or the file is cut short (${error.message}).`);
    return;
  }
  const { runs, study } = DATA;
  const only = runs.length === 1;
  const sheet = new Sheet();
  const main = el(
    "main",
    {},
    missingPart(runs, study),
    studyPart(study),
    only ? tiles(runs[0]) : null,
    comparisonPart(runs),
    heldOutPart(runs),
    ...runs.map((run) => difficultyPart(run, only)),
    trainingPart(runs),
    ...runs.map((run) => gatePart(run, only)),
    ...runs.map((run) => timePart(run, only)),
    promptsPart(runs, sheet),
    answersPart(runs, sheet),
    settingsPart(runs),
  );
  const head = el(
    "header",
    { class: "head" },
    el("p", { class: "over" }, `sppo-lightning ${inLine(DATA.version)} · report`),
    el("h1", {}, ...(study ? [study] : runs).flatMap((one, place) => [place ? " · " : "", el("bdi", {}, inLine(one.name))])),
    study ? studyFacts(study) : only ? headOf(runs[0]) : el("p", { class: "facts" }, `${runs.length} runs`),
  );
  page.replaceChildren(head, navigation(main), main);
  drawCharts();
  for (const step of LATER) step();
  document.documentElement.dataset.ready = "yes";
}

start();
