"use strict";
const $ = (id) => document.getElementById(id);
const root = document.documentElement;

// ---- light or dark
$("theme").hidden = false;
$("theme").addEventListener("click", () => {
  const dark = root.style.colorScheme ? root.style.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.style.colorScheme = dark ? "light" : "dark";
  document.dispatchEvent(new Event("themechange"));
});

// ---- tables: sort by a column, find a class
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), body = button.closest("table").tBodies[0];
    const column = head.cellIndex, down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentNode.cells) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.value;
    const compare = column ? (a, b) => value(a) - value(b) : (a, b) => value(a).localeCompare(value(b));
    body.append(...[...body.rows].sort((a, b) => (down ? -compare(a, b) : compare(a, b))));
  });
}
$("find-class").addEventListener("input", (event) => {
  const wanted = event.target.value.trim().toLowerCase().replaceAll(" ", "_");
  for (const row of $("class-table").tBodies[0].rows)
    row.hidden = !row.cells[0].dataset.value.toLowerCase().replaceAll(" ", "_").includes(wanted);
});
