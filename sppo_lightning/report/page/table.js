// A table of many rows: those in view are there, the others are a number. Rows have one height, so that no row is measured.

const SPARE = 6; // rows drawn beyond either end of the view

// columns: [{title, about, cell(row), key(row), numeric, wide, minor}]; key is what is sorted by, null sorts last.
class RowTable {
  constructor(columns, { label, open, empty }) {
    this.columns = columns;
    this.open = open;
    this.order = [];
    this.active = 0;
    this.sorted = { column: null, down: false };
    this.pool = []; // rows in the page, of which a row of the table always takes the same one
    this.body = el("div", { class: "body", role: "rowgroup" });
    this.heads = columns.map((column, place) => {
      const button = el("button", { type: "button", title: column.about, onclick: () => this.sortBy(place) }, column.title, el("span", { class: "arrow", "aria-hidden": "true" }));
      return el("div", { role: "columnheader", class: this.classOf(column) }, button);
    });
    const head = el("div", { class: "heads", role: "rowgroup" }, el("div", { class: "row", role: "row", "aria-rowindex": 1 }, ...this.heads));
    this.table = el("div", { class: "rows", role: "grid", "aria-label": label }, head, this.body);
    this.view = el("div", { class: "view", tabindex: -1, "--columns": this.widths(columns), "--few-columns": this.widths(columns.filter(({ minor }) => !minor)) }, this.table);
    this.nothing = el("p", { class: "nothing", hidden: true }, empty);
    this.node = el("div", { class: "row-table" }, this.view, this.nothing);
    this.view.addEventListener("scroll", () => this.later(), { passive: true });
    this.table.addEventListener("keydown", (event) => this.press(event));
    new ResizeObserver(() => this.later()).observe(this.view);
  }

  widths(columns) {
    return columns.map(({ wide, width }) => (wide ? "minmax(7rem, 1fr)" : (width ?? "var(--column)"))).join(" ");
  }

  classOf(column) {
    return [column.numeric ? "numeric" : "", column.wide ? "wide" : "", column.minor ? "minor" : ""].join(" ").trim();
  }

  // Show some rows, by their numbers, in the current order.
  show(rows) {
    this.order = [...rows];
    this.arrange();
    this.view.scrollTop = 0;
    this.active = 0;
    this.render();
  }

  sortBy(place) {
    const { column, down } = this.sorted;
    const first = Boolean(this.columns[place].numeric);
    this.sorted = column === place ? { column: place, down: !down } : { column: place, down: first };
    this.arrange();
    this.view.scrollTop = 0;
    this.render();
  }

  arrange() {
    const { column, down } = this.sorted;
    this.heads.forEach((head, place) => {
      if (place === column) head.setAttribute("aria-sort", down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    if (column === null) return;
    const { key } = this.columns[column];
    const keys = new Map(this.order.map((row) => [row, key(row)]));
    const sign = down ? -1 : 1;
    this.order.sort((one, other) => {
      const [a, b] = [keys.get(one), keys.get(other)];
      if (a === b) return one - other;
      if (a === null || a === undefined) return 1;
      if (b === null || b === undefined) return -1;
      return sign * (a < b ? -1 : 1);
    });
  }

  later() {
    if (this.waiting) return;
    this.waiting = true;
    requestAnimationFrame(() => {
      this.waiting = false;
      this.render();
    });
  }

  get height() {
    this.measured ??= parseFloat(css("--row-height"));
    return this.measured;
  }

  render() {
    const count = this.order.length;
    this.nothing.hidden = count > 0;
    this.view.hidden = count === 0;
    this.table.setAttribute("aria-rowcount", count + 1);
    const visible = Math.ceil((this.view.clientHeight || 600) / this.height);
    const start = Math.max(0, Math.min(Math.floor(this.view.scrollTop / this.height) - SPARE, count - visible));
    const end = Math.min(count, start + visible + 2 * SPARE);
    const focused = this.body.contains(document.activeElement);
    while (this.pool.length < Math.min(count, visible + 2 * SPARE)) this.body.append((this.pool[this.pool.length] = this.newRow()));
    const used = new Set();
    for (let place = start; place < end; place++) {
      const row = this.pool[place % this.pool.length];
      used.add(row);
      this.fill(row, place);
    }
    for (const row of this.pool) row.hidden = !used.has(row);
    this.body.style.setProperty("height", `${count * this.height}px`);
    if (focused) this.rowAt(this.active)?.focus({ preventScroll: true });
  }

  newRow() {
    const cells = this.columns.map((column) => el("div", { role: "gridcell", class: this.classOf(column), dir: column.wide ? "auto" : null }));
    const row = el("div", { class: "row", role: "row" }, ...cells);
    row.addEventListener("click", () => this.choose(row.place));
    return row;
  }

  fill(row, place) {
    const shown = this.order[place];
    row.tabIndex = place === this.active ? 0 : -1;
    if (row.place === place && row.shown === shown) return;
    Object.assign(row, { place, shown });
    row.setAttribute("aria-rowindex", place + 2);
    row.style.setProperty("transform", `translateY(${place * this.height}px)`);
    this.columns.forEach((column, number) => (row.children[number].textContent = column.cell(shown)));
  }

  rowAt(place) {
    return this.pool.find((row) => !row.hidden && row.place === place);
  }

  choose(place) {
    this.active = place;
    this.render();
    this.open(place);
  }

  press(event) {
    if (!this.body.contains(event.target)) return;
    const page = Math.max(1, Math.floor(this.view.clientHeight / this.height) - 2);
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (event.key === "Enter" || event.key === " ") this.choose(this.active);
    else if (event.key in steps) this.move(steps[event.key]);
    else return;
    event.preventDefault();
  }

  // Make another row the one that keys act on, and bring it into view.
  move(step) {
    this.active = Math.max(0, Math.min(this.order.length - 1, this.active + step));
    const top = this.active * this.height;
    const head = this.heads[0].offsetHeight;
    if (top < this.view.scrollTop) this.view.scrollTop = top;
    else if (top + this.height > this.view.scrollTop + this.view.clientHeight - head) this.view.scrollTop = top + this.height - this.view.clientHeight + head;
    this.render();
    this.rowAt(this.active)?.focus({ preventScroll: true });
  }
}

// A search field and some choices above a table; narrow(words, choices) returns the rows that stay.
function filters(choices, narrow, table, total) {
  const search = el("input", { type: "search", placeholder: "Search prompts", "aria-label": "Search prompts" });
  const count = el("output", { class: "count" });
  const selects = choices.map(({ label, options }) =>
    el("label", {}, el("span", {}, label), el("select", {}, ...options.map(([value, name]) => el("option", { value }, inLine(name))))),
  );
  let due;
  const apply = () => {
    const values = selects.map((label) => label.querySelector("select").value);
    const rows = narrow(search.value.trim().toLowerCase().split(/\s+/u).filter(Boolean), values);
    table.show(rows);
    count.textContent = rows.length === total ? `${whole(total)} rows` : `${whole(rows.length)} of ${whole(total)} rows`;
  };
  search.addEventListener("input", () => {
    clearTimeout(due);
    due = setTimeout(apply, 120);
  });
  for (const label of selects) label.addEventListener("change", apply);
  apply();
  return el("div", { class: "filters" }, search, ...selects, count);
}
