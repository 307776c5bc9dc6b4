// Numbers and names as people read them.

const NONE = "–";

function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return NONE;
  const size = Math.abs(value);
  if (size !== 0 && (size < 10 ** -digits || size >= 1e6)) return value.toExponential(2).replaceAll("-", "−");
  return value.toFixed(size >= 1000 ? 0 : digits).replace("-", "−");
}

const whole = (value) => (value === null || value === undefined ? NONE : Math.round(value).toLocaleString("en"));
const percent = (value) => (value === null || value === undefined ? NONE : `${(100 * value).toFixed(1)} %`);
const signed = (text) => (/^[−0.]*$|^−/u.test(text) || text === NONE ? text : `+${text}`);

// A value in the unit of its measure.
function inUnit(value, unit) {
  if (unit === "share") return percent(value);
  return number(value, unit === "tokens" ? 1 : 3);
}

function withInterval(estimate, unit, { sign = false } = {}) {
  if (!estimate || estimate.mean === null) return NONE;
  const signs = sign ? signed : (text) => text;
  if (estimate.stderr === null) return signs(inUnit(estimate.mean, unit));
  const reach = DATA.interval * estimate.stderr;
  if (unit === "share") return `${(100 * estimate.mean).toFixed(1)} ± ${percent(reach)}`;
  // as many digits as the interval has two of
  const digits = Math.min(8, Math.max(unit === "tokens" ? 1 : 3, reach > 0 ? Math.ceil(-Math.log10(reach)) + 1 : 0));
  return `${signs(estimate.mean.toFixed(digits).replace("-", "−"))} ± ${reach.toFixed(digits)}`;
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
