"use strict";
// Theme, sorting, figures. Without this script the page still shows its tables and key numbers.
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement, system = matchMedia("(prefers-color-scheme: dark)");
const plots = [...document.querySelectorAll("[data-figure]")];
let chosen = null;
try { chosen = localStorage.getItem("gacha-theme"); } catch { /* storage may be closed to file:// pages */ }
let tracesOf = (figure) => figure.data; // a page's own script may choose among them
const isDark = () => (chosen ?? (system.matches ? "dark" : "light")) === "dark";

function recolour(value, dark) {
  if (typeof value === "string") return (dark && data.dark[value]) || value;
  if (Array.isArray(value)) return value.map((item) => recolour(item, dark));
  if (value && typeof value === "object")
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, recolour(item, dark)]));
  return value;
}

function draw(dark, places = plots, paper = 0) {
  if (!window.Plotly) return;
  for (const place of places) {
    const figure = data.figures[place.dataset.figure];
    const { traces, layout } = recolour({ traces: tracesOf(figure), layout: figure.layout }, dark);
    if (paper) layout.width = place.closest(".pair") ? paper / 2 - 8 : paper;
    Plotly.react(place, traces, layout, { responsive: true, displayModeBar: false });
  }
}

const toggle = document.getElementById("theme");
function apply() {
  if (chosen) root.dataset.theme = chosen;
  toggle.textContent = isDark() ? "Light" : "Dark";
  toggle.setAttribute("aria-label", `Switch to the ${isDark() ? "light" : "dark"} theme`);
  draw(isDark());
}
toggle.hidden = false;
toggle.addEventListener("click", () => {
  chosen = isDark() ? "light" : "dark";
  try { localStorage.setItem("gacha-theme", chosen); } catch { /* it lasts for this visit then */ }
  apply();
});
system.addEventListener("change", apply);
addEventListener("beforeprint", () => draw(false, plots, 700)); // a sheet's width: it is not laid out yet
addEventListener("afterprint", () => draw(isDark()));

for (const table of [...document.querySelectorAll("table")].filter((one) => one.querySelector("th[aria-sort]"))) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((other) => other.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
    const numeric = [...table.tBodies[0].rows].every((row) => key(row) === "" || !Number.isNaN(Number(key(row))));
    const order = (a, b) => (numeric ? Number(a) - Number(b) : a.localeCompare(b, undefined, { numeric: true }));
    const rows = [...table.tBodies[0].rows].sort((one, two) => {
      const a = key(one), b = key(two);
      if (a === "" || b === "") return (a === "") - (b === ""); // what is not known stays last either way
      return down ? order(b, a) : order(a, b);
    });
    table.tBodies[0].append(...rows);
    table.dispatchEvent(new Event("sorted"));
  }));
}

async function unpack() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
  draw(isDark());
}
apply();
unpack().catch((reason) => {
  for (const place of plots) place.textContent = `This browser could not draw the figure (${reason}).`;
});
