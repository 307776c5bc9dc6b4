// What opens from a row: a prompt with all its responses, or a held-out prompt with two answers next to each other.

class Sheet {
  constructor() {
    this.heading = el("h2", { id: "sheet-title" });
    this.content = el("div", { class: "sheet-content" });
    const button = (name, label, step) => el("button", { type: "button", "aria-label": label, title: label, onclick: () => this.step(step) }, name);
    const close = el("button", { type: "button", "aria-label": "Close", title: "Close (Esc)", onclick: () => this.dialog.close() }, "✕");
    this.dialog = el(
      "dialog",
      { "aria-labelledby": "sheet-title" },
      el("header", {}, this.heading, el("nav", {}, button("←", "Previous row", -1), button("→", "Next row", 1), close)),
      this.content,
    );
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close();
    });
    this.dialog.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step && !event.target.closest("select, input")) this.step(step);
    });
    document.body.append(this.dialog);
  }

  // Let a table's rows be leafed through; fill(row, heading, content) shows one.
  open(table, place, fill) {
    Object.assign(this, { table, place, fill });
    this.show();
    if (!this.dialog.open) this.dialog.showModal();
    this.dialog.addEventListener("close", () => table.move(0), { once: true });
  }

  step(step) {
    const next = this.place + step;
    if (next < 0 || next >= this.table.order.length) return;
    this.place = next;
    this.table.active = next;
    this.show();
  }

  async show() {
    const { place } = this;
    const content = el("div", {}, el("p", { class: "nothing" }, "Opening…"));
    this.content.replaceChildren(content);
    this.content.scrollTop = 0;
    try {
      await this.fill(this.table.order[place], this.heading, content);
    } catch (error) {
      content.replaceChildren(el("p", { class: "trouble" }, `These texts cannot be opened: ${error.message}`));
    }
  }
}

function promptHeading(heading, prompt) {
  const category = PROMPTS.categories?.[prompt];
  heading.replaceChildren(el("bdi", {}, inLine(PROMPTS.ids[prompt]).slice(0, 120)), category ? el("span", { class: "tag" }, inLine(category)) : "");
}

const labelled = (label, ...nodes) => el("section", { class: "labelled" }, el("h3", {}, label), ...nodes);

// ------------------------------------------------------------ a prompt that was sampled

async function fillPrompt(row, heading, content) {
  const prompt = PROMPTS.prompt[row];
  promptHeading(heading, prompt);
  const rows = [row, ...PROMPTS.ofPrompt(prompt).filter((other) => other !== row)]; // the one that was asked for first
  const parts = await Promise.all(rows.map(responsesOf));
  const nodes = rows.map((other, place) => iterationOf(other, parts[place]));
  content.replaceChildren(labelled("Prompt", textBlock(await promptText(prompt))), ...nodes);
}

async function promptText(prompt) {
  const block = PROMPTS.prompt_blocks[prompt];
  return block === undefined ? PROMPTS.prompts[prompt] : (await texts(block))[`p${prompt}`];
}

async function responsesOf(row) {
  const key = `t${PROMPTS.run[row]}.${PROMPTS.iteration[row]}.${PROMPTS.prompt[row]}`;
  const blocks = await Promise.all(PROMPTS.blocks[row].map(texts));
  const found = blocks.map((block) => block[key]).filter(Boolean);
  return {
    answers: found.flatMap((one) => one.answers),
    pairs: found.find((one) => one.pairs.length)?.pairs ?? [],
  };
}

function iterationOf(row, { answers, pairs }) {
  const run = DATA.runs.length > 1 ? `${inLine(DATA.runs[PROMPTS.run[row]].name)}, ` : "";
  const facts = [
    outcomeName(PROMPTS.outcomes[PROMPTS.outcome[row]]),
    `difficulty ${number(PROMPTS.difficulty[row])}`,
    `mean reward ${number(PROMPTS.reward[row])}`,
  ];
  const sorted = [...answers].sort((one, other) => (other.reward ?? -Infinity) - (one.reward ?? -Infinity));
  return el(
    "section",
    { class: "labelled" },
    el("h3", {}, `${run}iteration ${PROMPTS.iteration[row]}`, el("span", { class: "facts" }, facts.join(" · "))),
    ...sorted.map((answer) => responseCard(answer, pairs)),
    answers.length ? null : el("p", { class: "nothing" }, "Its responses are not in this report."),
    comparePair(answers, pairs),
  );
}

function responseCard(answer, pairs) {
  const chosen = pairs.filter((pair) => pair.chosen === answer.sample);
  const rejected = pairs.filter((pair) => pair.rejected === answer.sample);
  const logp = chosen[0]?.chosen_logp ?? rejected[0]?.rejected_logp ?? answer.logp;
  const facts = [`reward ${number(answer.reward)}`];
  for (const [name, value] of Object.entries(answer.parts ?? {})) facts.push(`${inLine(name)} ${number(value)}`);
  facts.push(`${whole(answer.length)} tokens`);
  if (answer.finish === "length") facts.push("cut by the length limit");
  if (answer.finish === "failed") facts.push("failed");
  if (logp !== undefined) {
    const whose = answer.logp === undefined ? "reference log-prob" : "log-prob";
    facts.push(`${whose} ${number(logp, 1)} nat (${number(logp / Math.max(answer.length, 1), 2)} per token)`);
  }
  if (answer.drop) facts.push(`left out: ${outcomeName(inLine(answer.drop))}`);
  const marks = [
    chosen.length ? el("span", { class: "mark chosen" }, "▲ chosen") : null,
    rejected.length ? el("span", { class: "mark rejected" }, "▼ rejected") : null,
  ];
  const kind = chosen.length ? "is-chosen" : rejected.length ? "is-rejected" : "";
  return el("article", { class: `answer ${kind}` }, el("p", { class: "facts" }, ...marks, facts.join(" · ")), textBlock(answer.text));
}

function comparePair(answers, pairs) {
  const bySample = new Map(answers.map((answer) => [answer.sample, answer]));
  const found = pairs.filter((pair) => bySample.has(pair.chosen) && bySample.has(pair.rejected));
  if (!found.length) return null;
  const details = el("details", {}, el("summary", {}, "Rejected and chosen, word by word"));
  details.addEventListener(
    "toggle",
    () => details.append(...found.map((pair) => sideBySide(bySample.get(pair.rejected), bySample.get(pair.chosen), ["rejected", "chosen"]))),
    { once: true },
  );
  return details;
}

// ------------------------------------------------------------ a held-out prompt

async function fillHeldOut(prompt, heading, content) {
  promptHeading(heading, prompt);
  const answers = [];
  PROMPTS.held_out.forEach((evaluations, run) =>
    evaluations.forEach((one) => {
      const place = one.prompt.indexOf(prompt);
      if (place < 0) return;
      const name = DATA.runs.length > 1 ? `${inLine(DATA.runs[run].name)}, ${policyName(one.finished)}` : policyName(one.finished);
      answers.push({ name, run, key: `e${run}.${one.finished}.${prompt}`, block: one.block[place], reward: one.reward[place], length: one.length[place] });
    }),
  );
  const last = answers.length - 1;
  const otherRun = answers.findLastIndex((one) => one.run !== answers[last].run);
  const choice = (place, label) =>
    el("label", {}, el("span", {}, label), el("select", {}, ...answers.map((one, number) => el("option", { value: number, selected: number === place }, one.name))));
  const left = choice(otherRun >= 0 ? otherRun : 0, "Left");
  const right = choice(last, "Right");
  const sides = el("div", {});
  const update = async () => {
    const [one, other] = [left, right].map((label) => answers[label.querySelector("select").value]);
    const [first, second] = await Promise.all([textsOf(one), textsOf(other)]);
    sides.replaceChildren(sideBySide(first ?? missing(one), second ?? missing(other), [one.name, other.name]));
  };
  left.addEventListener("change", update);
  right.addEventListener("change", update);
  await update();
  content.replaceChildren(labelled("Prompt", textBlock(await promptText(prompt))), labelled("Answers", el("div", { class: "filters" }, left, right), sides));
}

const missing = ({ reward, length }) => ({ text: "", reward, length });

async function textsOf({ block, key }) {
  return block === null ? undefined : (await texts(block))[key];
}

// ------------------------------------------------------------ two texts, word by word

const COMPARED = 20_000; // characters of each text

function sideBySide(one, other, names) {
  const parts =
    one.text.length + other.text.length <= 2 * COMPARED
      ? Diff.diffWordsWithSpace(one.text, other.text, { timeout: 400, maxEditLength: 4000 })
      : undefined;
  const nodes = [[], []];
  for (const part of parts ?? []) {
    const shown = () => textNodes(part.value);
    if (!part.added) nodes[0].push(...(part.removed ? [el("del", {}, ...shown())] : shown()));
    if (!part.removed) nodes[1].push(...(part.added ? [el("ins", {}, ...shown())] : shown()));
  }
  const side = (answer, place) =>
    el(
      "article",
      { class: "answer" },
      el("h4", {}, names[place]),
      el("p", { class: "facts" }, answerFacts(answer)),
      parts && answer.text ? el("div", { class: "text", dir: "auto" }, ...nodes[place]) : textBlock(answer.text),
    );
  const note = parts ? null : el("p", { class: "nothing" }, "These texts are too long or too different to mark their words.");
  return el("div", {}, el("div", { class: "sides" }, side(one, 0), side(other, 1)), note);
}

function answerFacts(answer) {
  const facts = [`reward ${number(answer.reward)}`, `${whole(answer.length)} tokens`];
  if (answer.finish === "length") facts.push("cut by the length limit");
  if (answer.logp !== undefined) facts.push(`log-prob ${number(answer.logp, 1)} nat`);
  return facts.join(" · ");
}
