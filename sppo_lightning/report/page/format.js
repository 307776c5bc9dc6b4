// Numbers and names as people read them.

const NONE = "–";

function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  const size = Math.abs(value);
  if (size !== 0 && (size < 10 ** -digits || size >= 1e6)) return value.toExponential(2).replace("-", "−").replace("e−", "e−");
  return value.toFixed(size >= 1000 ? 0 : digits).replace("-", "−");
}

const whole = (value) => (value === null || value === undefined ? NONE : Math.round(value).toLocaleString("en"));
const percent = (value) => (value === null || value === undefined ? NONE : `${(100 * value).toFixed(1)} %`);
const signed = (text) => (text.startsWith("−") || text === NONE ? text : `+${text}`);

// A value in the unit of its measure.
function inUnit(value, unit) {
  if (unit === "share") return percent(value);
  return number(value, unit === "tokens" ? 1 : 3);
}

function withInterval(estimate, unit, { sign = false } = {}) {
  if (!estimate || estimate.mean === null) return NONE;
  const mean = sign ? signed(inUnit(estimate.mean, unit)) : inUnit(estimate.mean, unit);
  if (estimate.stderr === null) return mean;
  return `${mean} ± ${inUnit(DATA.interval * estimate.stderr, unit)}`;
}

function duration(seconds) {
  if (seconds === null || seconds === undefined) return NONE;
  if (seconds < 90) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
}

const policyName = (finished) => (finished === 0 ? "initial policy" : `after ${finished} iteration${finished === 1 ? "" : "s"}`);

const OUTCOMES = {
  paired: "has a pair",
  not_selected: "not selected",
  not_scheduled: "not scheduled",
  too_long: "too long",
  tied_rewards: "tied rewards",
  identical_responses: "identical responses",
  no_pair: "no pair chosen",
  pair_not_selected: "pair not selected",
  non_finite_reward: "no finite reward",
  not_scored: "not scored yet",
  pending: "not paired yet",
};
const outcomeName = (name) => OUTCOMES[name] ?? String(name).replaceAll("_", " ");
