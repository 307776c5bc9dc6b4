// Line charts with intervals, and histograms; lines differ in dash and marker, not in colour alone.

const DASHES = [[], [7, 4], [2, 3], [10, 3, 2, 3], [14, 4]];
const MARKERS = ["circle", "square", "triangle", "diamond", "cross"];
const charts = new Set();

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (place) => css(`--series-${(place % 5) + 1}`);

function markerPath(shape, x, y, size) {
  const path = new Path2D();
  if (shape === "circle") path.arc(x, y, size, 0, 2 * Math.PI);
  else if (shape === "square") path.rect(x - size, y - size, 2 * size, 2 * size);
  else if (shape === "triangle") {
    path.moveTo(x, y - 1.2 * size);
    path.lineTo(x + 1.2 * size, y + size);
    path.lineTo(x - 1.2 * size, y + size);
    path.closePath();
  } else if (shape === "diamond") {
    path.moveTo(x, y - 1.4 * size);
    path.lineTo(x + 1.4 * size, y);
    path.lineTo(x, y + 1.4 * size);
    path.lineTo(x - 1.4 * size, y);
    path.closePath();
  } else {
    path.rect(x - 1.3 * size, y - size / 3, 2.6 * size, size / 1.5);
    path.rect(x - size / 3, y - 1.3 * size, size / 1.5, 2.6 * size);
  }
  return path;
}

// A sample of a line for a legend: its dash, and its marker where it has one.
function lineSample(place, marked) {
  const sample = svg("svg", { width: 34, height: 12, viewBox: "0 0 34 12", "aria-hidden": "true", class: `series-${(place % 5) + 1}` });
  sample.append(svg("line", { x1: 1, x2: 33, y1: 6, y2: 6, "stroke-width": 2, "stroke-dasharray": DASHES[place % 5].join(" ") }));
  if (!marked) return sample;
  const shape = MARKERS[place % 5];
  if (shape === "circle") sample.append(svg("circle", { cx: 17, cy: 6, r: 3.5 }));
  else if (shape === "square") sample.append(svg("rect", { x: 13.5, y: 2.5, width: 7, height: 7 }));
  else if (shape === "triangle") sample.append(svg("path", { d: "M17 1.5 21.5 9.5 12.5 9.5Z" }));
  else if (shape === "diamond") sample.append(svg("path", { d: "M17 1 22 6 17 11 12 6Z" }));
  else sample.append(svg("path", { d: "M15.8 1h2.4v3.8H22v2.4h-3.8V11h-2.4V7.2H12V4.8h3.8Z" }));
  return sample;
}

function legend(names, marked) {
  if (names.length < 2) return null;
  return el("ul", { class: "legend" }, ...names.map((name, place) => el("li", {}, lineSample(place, marked), el("bdi", {}, inLine(name)))));
}

// What stands at the cursor, in words below the chart; arrow keys move it.
function followCursor(node, chart, words) {
  const readout = el("output", { class: "readout" });
  node.append(readout);
  chart.hooks.setCursor = [(u) => (readout.textContent = u.cursor.idx === null || u.cursor.left < 0 ? "" : words(u.cursor.idx))];
  return (u) => {
    u.root.tabIndex = 0;
    u.root.setAttribute("role", "img");
    u.root.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const place = Math.max(0, Math.min(u.data[0].length - 1, (u.cursor.idx ?? (step > 0 ? -1 : u.data[0].length)) + step));
      u.setCursor({ left: u.valToPos(u.data[0][place], "x"), top: 10 });
    });
    u.root.addEventListener("blur", () => u.setCursor({ left: -10, top: -10 }));
  };
}

function axes(xTitle, yFormat, { xs, xFormat } = {}) {
  const common = { stroke: () => css("--muted"), font: "12px system-ui, sans-serif", ticks: { show: false } };
  const grid = { stroke: () => css("--line"), width: 1 };
  return [
    {
      ...common,
      label: xTitle,
      labelFont: "12px system-ui, sans-serif",
      labelSize: 18,
      size: 24,
      grid: { show: false },
      ...(xs ? { splits: () => xs } : {}),
      values: (u, splits) => splits.map((value) => (xFormat ? xFormat(value) : Number.isInteger(value) ? whole(value) : "")),
    },
    { ...common, grid, size: 52, values: (u, splits) => splits.map(yFormat) },
  ];
}

function draw(node, options, data, height, prepare, label) {
  const plot = el("div", { class: "plot" });
  node.prepend(plot);
  const width = () => Math.max(200, Math.floor(plot.clientWidth || 300));
  const u = new uPlot({ width: width(), height, legend: { show: false }, ...options }, data, plot);
  prepare(u);
  u.root.setAttribute("aria-label", label);
  new ResizeObserver(() => {
    if (Math.abs(u.width - width()) > 1) u.setSize({ width: width(), height });
  }).observe(plot);
  charts.add(u);
}

// series: [{name, x, y, error?}], errors to either side; the same x may be missing in some of them.
function lineChart(node, { title, unit, xTitle, series, marks = [], base = null, wholeX = false, xFormat, zero = false, smooth = false }) {
  const format = (value) => inUnit(value, unit);
  const few = series.every((one) => one.x.length <= 24);
  const joined = uPlot.join(series.map((one) => [one.x, one.y]));
  const xs = joined[0];
  const errors = series.map((one) => {
    const known = new Map(one.x.map((x, place) => [x, one.error?.[place] ?? 0]));
    return xs.map((x) => known.get(x) ?? 0);
  });
  const shown = smooth ? joined.slice(1).map(runningMean) : joined.slice(1);
  const chart = { hooks: {} };
  const prepare = followCursor(node, chart, (place) => {
    const values = series.map((one, number) => {
      const value = joined[number + 1][place];
      if (value === null || value === undefined) return null;
      const error = errors[number][place];
      const name = series.length > 1 ? `${inLine(one.name)} ` : "";
      return `${name}${format(value)}${error ? ` ± ${format(error)}` : ""}`;
    });
    return `${xFormat ? xFormat(xs[place]) : `${xTitle} ${whole(xs[place])}`}: ${values.filter((value) => value !== null).join(" · ")}`;
  });
  const dpr = () => devicePixelRatio || 1;
  chart.hooks.draw = [
    (u) => {
      const { ctx } = u;
      ctx.save();
      ctx.beginPath();
      ctx.rect(u.bbox.left - 6 * dpr(), u.bbox.top - 6 * dpr(), u.bbox.width + 12 * dpr(), u.bbox.height + 12 * dpr());
      ctx.clip();
      ctx.lineWidth = dpr();
      for (const mark of marks) {
        const x = Math.round(u.valToPos(mark, "x", true));
        ctx.strokeStyle = css("--muted");
        ctx.setLineDash([2 * dpr(), 4 * dpr()]);
        ctx.beginPath();
        ctx.moveTo(x, u.bbox.top);
        ctx.lineTo(x, u.bbox.top + u.bbox.height);
        ctx.stroke();
      }
      if (base !== null) {
        const y = Math.round(u.valToPos(base, "y", true));
        ctx.strokeStyle = css("--muted");
        ctx.setLineDash([2 * dpr(), 4 * dpr()]);
        ctx.beginPath();
        ctx.moveTo(u.bbox.left, y);
        ctx.lineTo(u.bbox.left + u.bbox.width, y);
        ctx.stroke();
      }
      ctx.setLineDash([]);
      series.forEach((one, number) => {
        ctx.strokeStyle = ctx.fillStyle = colour(number);
        xs.forEach((x, place) => {
          const value = joined[number + 1][place];
          if (value === null || value === undefined || !few) return;
          // runs at the same x stand side by side
          const left = u.valToPos(x, "x", true) + (number - (series.length - 1) / 2) * 5 * dpr();
          const error = errors[number][place];
          if (error) {
            const [low, high] = [value - error, value + error].map((end) => u.valToPos(end, "y", true));
            ctx.lineWidth = 1.5 * dpr();
            ctx.beginPath();
            ctx.moveTo(left, low);
            ctx.lineTo(left, high);
            for (const end of [low, high]) {
              ctx.moveTo(left - 4 * dpr(), end);
              ctx.lineTo(left + 4 * dpr(), end);
            }
            ctx.stroke();
          }
          ctx.fill(markerPath(MARKERS[number % 5], left, u.valToPos(value, "y", true), 3.5 * dpr()));
        });
      });
      ctx.restore();
    },
  ];
  const finite = joined.slice(1).flatMap((values, number) =>
    values.flatMap((value, place) => (value === null || value === undefined ? [] : [value - errors[number][place], value + errors[number][place]])),
  );
  if (base !== null) finite.push(base);
  const raw = smooth && shown.some((values, place) => values !== joined[place + 1]);
  const lines = (values, extra) => series.map((one, number) => ({ stroke: () => colour(number), dash: DASHES[number % 5], width: 2, spanGaps: true, points: { show: false }, ...extra }));
  const options = {
    ...chart,
    scales: {
      x: { time: false, range: (u, low, high) => (wholeX ? [low - 0.25, high + 0.25] : [low, high === low ? low + 1 : high]) },
      y: { range: () => padded(finite, zero) },
    },
    axes: axes(xTitle, (value) => tick(value, unit), wholeX ? { xs, xFormat } : {}),
    series: [{}, ...(raw ? lines(joined, { alpha: 0.25, width: 1, dash: [] }) : []), ...lines(shown)],
    cursor: { y: false, points: { show: false }, drag: { x: !wholeX, y: false } },
  };
  draw(node, options, [xs, ...(raw ? joined.slice(1) : []), ...shown], 200, prepare, `${title}. ${summaryOf(series, format)}`);
}

function summaryOf(series, format) {
  return series
    .filter((one) => one.y.length)
    .map((one) => `${inLine(one.name)}: from ${format(one.y[0])} to ${format(one.y.at(-1))}`)
    .join("; ");
}

function padded(values, zero) {
  let [low, high] = values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
  if (zero) low = Math.min(0, low);
  const space = (high - low) * 0.08 || Math.abs(high) * 0.1 || 0.5;
  return [zero && low === 0 ? 0 : low - space, high + space];
}

function tick(value, unit) {
  if (unit === "share") return `${Math.round(value * 1000) / 10} %`;
  if (value !== 0 && Math.abs(value) < 0.001) return value.toExponential(0).replace("-", "−");
  return String(Math.round(value * 1e6) / 1e6).replace("-", "−");
}

// The mean over a window of a 25th of the curve, centred.
function runningMean(values) {
  const reach = Math.floor(values.length / 50);
  if (reach < 1) return values;
  return values.map((value, place) => {
    const near = values.slice(Math.max(0, place - reach), place + reach + 1).filter((one) => one !== null && one !== undefined);
    return near.length ? near.reduce((sum, one) => sum + one, 0) / near.length : value;
  });
}

function hatched() {
  const tile = document.createElement("canvas");
  tile.width = tile.height = 6;
  const ctx = tile.getContext("2d");
  ctx.strokeStyle = css("--muted");
  ctx.lineWidth = 1;
  ctx.beginPath();
  for (const shift of [-6, 0, 6]) {
    ctx.moveTo(shift, 6);
    ctx.lineTo(shift + 6, 0);
  }
  ctx.stroke();
  return ctx.createPattern(tile, "repeat");
}

// Stacked bars: what was selected is filled, the rest hatched.
function histogramChart(node, { title, edges, selected, others, most, xTitle }) {
  const middles = selected.map((count, place) => (edges[place] + edges[place + 1]) / 2);
  const sums = selected.map((count, place) => count + others[place]);
  const bars = uPlot.paths.bars({ size: [0.92, 100], gap: 1 });
  const chart = { hooks: {} };
  const prepare = followCursor(
    node,
    chart,
    (place) => `${number(edges[place], 2)} to ${number(edges[place + 1], 2)}: ${whole(selected[place])} selected, ${whole(others[place])} not`,
  );
  const options = {
    ...chart,
    scales: { x: { time: false, range: () => [edges[0], edges.at(-1)] }, y: { range: () => [0, most * 1.05 || 1] } },
    axes: axes(xTitle, (value) => whole(value), { xFormat: (value) => tick(value, "reward") }),
    series: [
      {},
      { paths: bars, fill: hatched, stroke: () => css("--muted"), width: 1, points: { show: false } },
      { paths: bars, fill: () => colour(0), stroke: () => colour(0), width: 1, points: { show: false } },
    ],
    cursor: { y: false, points: { show: false }, drag: { x: false, y: false } },
  };
  draw(node, options, [middles, sums, selected], 150, prepare, title);
}

function redrawCharts() {
  for (const chart of charts) chart.redraw();
}

for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", redrawCharts);
