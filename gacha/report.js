// A pull pointed at in the table stands out in the figures.
function highlight(run) {
  for (const place of plots) {
    const marked = (place.data ?? []).map((trace, i) => [trace, i]).filter(([trace]) => trace.meta);
    if (!marked.length) continue;
    place.own ??= new Map(marked.map(([trace, i]) => [i, trace.opacity ?? 1]));
    const opacity = marked.map(([trace, i]) => (run === null ? place.own.get(i) : trace.meta === run ? 1 : 0.12));
    Plotly.restyle(place, { opacity }, marked.map(([, i]) => i));
  }
}
for (const row of document.getElementById("pulls").tBodies[0].rows) {
  row.addEventListener("mouseenter", () => window.Plotly && highlight(row.dataset.run));
  row.addEventListener("mouseleave", () => window.Plotly && highlight(null));
}
