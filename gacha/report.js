// Recipe and text filter the table and the figures; a pull pointed at in the table stands out in the figures.
const table = document.getElementById("pulls"), rows = () => [...table.tBodies[0].rows];
const [picker, find, every, whole] = ["recipe", "find", "every", "whole"].map((id) => document.getElementById(id));
const LONG = 100, MANY = 200, length = document.getElementById("length"), count = document.getElementById("count");
const drawnByRun = plots.filter(({ dataset }) => {
  const { data: traces, more } = data.figures[dataset.figure];
  return more || traces.some((trace) => trace.meta);
});
let cut = rows().length > LONG, pointed = null, timer = 0;
const recipe = () => picker?.value ?? "";

// A pull that waited until it was asked for.
const line = (one) => ({
  type: "scatter", mode: "lines", x: one.x, y: one.y, meta: one.run, opacity: one.status === "diverged" ? 0.9 : 0.5,
  line: { color: one.color, width: 1, dash: one.dash },
  hovertemplate: `<b>${one.name}</b> ${one.status}<br>%{x:.3s} tokens<br>%{y:.4f}<extra></extra>`,
});

tracesOf = (figure) => {
  const mine = recipe();
  const asked = (one) => one.run === pointed || (mine ? one.recipe === mine : every?.checked);
  const waiting = figure.more ?? [];
  const has = figure.data.some((trace) => trace.legendgroup === mine) || waiting.some((one) => one.recipe === mine);
  const fits = (trace) => !has || !trace.legendgroup || trace.legendgroup === mine;
  const traces = [...figure.data.filter(fits), ...waiting.filter(asked).map(line)];
  if (!traces.some((trace) => trace.meta && trace.meta === pointed)) return traces;
  return traces.map((trace) =>
    trace.meta ? { ...trace, opacity: trace.meta === pointed ? 1 : 0.12, line: { ...trace.line,
      width: trace.meta === pointed ? 2.4 : trace.line?.width } } : trace);
};

function point(run) {
  clearTimeout(timer);
  timer = setTimeout(() => {
    if (run === pointed) return;
    pointed = run;
    // A figure of very many lines is not drawn anew for each row that the pointer passes.
    draw(isDark(), drawnByRun.filter((place) => (place.data?.length ?? 0) < MANY));
  }, 60);
}

function list() {
  const words = (find?.value ?? "").toLowerCase().split(/\s+/).filter(Boolean), mine = recipe();
  let fit = 0;
  for (const row of rows()) {
    const text = words.length ? row.textContent.toLowerCase() : "";
    const fits = (!mine || row.dataset.recipe === mine) && words.every((word) => text.includes(word));
    row.hidden = !fits || (++fit > LONG && cut);
    row.tabIndex = -1;
  }
  const first = rows().find((row) => !row.hidden), listed = Math.min(fit, cut ? LONG : fit), all = rows().length;
  if (first) first.tabIndex = 0;
  const of = fit < all ? ` that fit, of ${all.toLocaleString()} pulls` : " pulls";
  count.textContent = (listed < fit ? `The first ${listed} of ` : "") + `${fit.toLocaleString()}${of}.`;
  length.hidden = all === fit && !(all > LONG);
  whole.hidden = fit <= LONG;
  whole.textContent = cut ? `Show all ${fit.toLocaleString()}` : `Show ${LONG}`;
}

const tools = document.getElementById("tools");
if (tools) tools.hidden = false;
picker?.addEventListener("change", () => { list(); draw(isDark()); });
every?.addEventListener("change", () => draw(isDark(), drawnByRun));
find?.addEventListener("input", list);
whole.addEventListener("click", () => { cut = !cut; list(); });
table.addEventListener("sorted", list);
const rowOf = (event) => event.target.closest("tbody tr");
table.addEventListener("mouseover", (event) => point(rowOf(event)?.dataset.run ?? null));
table.addEventListener("mouseleave", () => point(null));
table.addEventListener("focusin", (event) => point(rowOf(event)?.dataset.run ?? null));
table.addEventListener("focusout", () => point(null));
table.addEventListener("keydown", (event) => {
  const way = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key], row = rowOf(event);
  if (!way || !row) return;
  let next = row[way];
  while (next?.hidden) next = next[way];
  if (!next) return;
  event.preventDefault();
  row.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
});
list();
