"use strict";
const $ = (id) => document.getElementById(id);
const { classes, before, drop } = JSON.parse($("data").textContent);
const cards = [...document.querySelectorAll(".audit")];
const decisions = new Map(); // photo -> class, or drop
const KEPT = `nutrilearn-audit ${cards.map((card) => card.dataset.name).join("\n").split("").reduce((h, c) => (31 * h + c.charCodeAt(0)) | 0, 7)}`;
let now = null, isSaved = true;

// ---- what is decided, kept in the browser where it lets us
function remember() {
  try { localStorage.setItem(KEPT, JSON.stringify([...decisions])); } catch { /* private windows: the saved file is what counts */ }
}
function recall() {
  try { return JSON.parse(localStorage.getItem(KEPT)) ?? []; } catch { return []; }
}
function show(card) {
  const decision = decisions.get(card.dataset.name), { label } = card.dataset;
  for (const button of card.querySelectorAll("[data-decide]"))
    button.setAttribute("aria-pressed", button.dataset.decide === decision);
  card.classList.toggle("done", decision !== undefined);
  card.querySelector(".decided").textContent =
    decision === undefined ? "" : decision === drop ? "Left out of training" : decision === label ? `Stays ${label}` : `Becomes ${decision}`;
}
function showProgress() {
  const kinds = { kept: 0, relabeled: 0, dropped: 0 };
  for (const card of cards) {
    const decision = decisions.get(card.dataset.name);
    if (decision !== undefined) kinds[decision === drop ? "dropped" : decision === card.dataset.label ? "kept" : "relabeled"] += 1;
  }
  $("progress").textContent = `${decisions.size} of ${cards.length} decided: ${kinds.relabeled} relabeled, ${kinds.dropped} dropped, ${kinds.kept} kept`;
}
function decide(card, decision) {
  if (decision === undefined) decisions.delete(card.dataset.name);
  else decisions.set(card.dataset.name, decision);
  isSaved = false;
  remember();
  show(card);
  showProgress();
}

// ---- where the keyboard is
const visible = () => cards.filter((card) => !card.hidden);
function goTo(card) {
  if (!card) return;
  now?.classList.remove("now");
  now?.setAttribute("tabindex", "-1");
  now = card;
  now.classList.add("now");
  now.setAttribute("tabindex", "0");
  now.focus({ preventScroll: true });
  now.scrollIntoView({ block: "nearest" });
}
function move(step) {
  const shown = visible(), at = shown.indexOf(now);
  goTo(at < 0 ? shown[0] : shown[Math.max(0, Math.min(shown.length - 1, at + step))]);
}
function decideAndMove(decision) {
  decide(now, decision);
  move(1);
}
const KEYS = {
  ArrowRight: () => move(1), ArrowDown: () => move(1), ArrowLeft: () => move(-1), ArrowUp: () => move(-1),
  Enter: () => decideAndMove(now.dataset.suggestion), k: () => decideAndMove(now.dataset.label),
  d: () => decideAndMove(drop), u: () => decide(now, undefined), o: () => now.querySelector("input").focus(),
  w: () => $("heat")?.click(),
};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input:not(#heat), select, button")) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const chosen = now?.querySelector(`[data-key="${CSS.escape(key)}"]`);
  const act = chosen ? () => decideAndMove(chosen.dataset.decide) : KEYS[key];
  if (!act || !cards.length) return;
  event.preventDefault();
  if (now) act();
  else move(0);
});

// ---- the mouse, and typed dishes
const asClass = (text) => text.trim().toLowerCase().replace(/[\s-]+/g, "_");
for (const card of cards) {
  const input = card.querySelector("input");
  card.addEventListener("click", (event) => {
    const button = event.target.closest("[data-decide]");
    if (button) decide(card, button.getAttribute("aria-pressed") === "true" ? undefined : button.dataset.decide);
    if (event.target !== input) goTo(card);
  });
  input.addEventListener("change", () => {
    const name = classes.find((known) => known === input.value.trim() || known === asClass(input.value));
    $("problem").hidden = name !== undefined || !input.value.trim();
    if (name !== undefined) decide(card, name);
    else if (input.value.trim()) $("problem").textContent = `No dish of the data is called ${input.value.trim()}.`;
  });
  input.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === "Escape") goTo(card);
  });
  for (const button of card.querySelectorAll(`[data-decide="${CSS.escape(card.dataset.suggestion)}"]`)) button.classList.add("suggested");
}
$("kind").addEventListener("change", (event) => {
  for (const card of cards) card.hidden = event.target.value !== "" && card.dataset.of !== event.target.value;
  goTo(visible()[0]);
});

// ---- labels.csv: what was decided before, and now
const quoted = (text) => (/[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
const named = (path) => (/^[=+@\t-]/.test(path) ? `./${path}` : path); // not a formula for a spreadsheet
function asCsv() {
  const rows = new Map([...Object.entries(before), ...decisions]);
  return ["path,label", ...[...rows].map(([path, label]) => `${quoted(named(path))},${quoted(label)}`), ""].join("\r\n");
}
$("save").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([asCsv()], { type: "text/csv" }));
  link.download = "labels.csv";
  link.click();
  URL.revokeObjectURL(link.href);
  isSaved = true;
});
window.addEventListener("beforeunload", (event) => { if (!isSaved) event.preventDefault(); });

for (const [name, decision] of recall()) {
  const card = cards.find((other) => other.dataset.name === name);
  if (card && (decision === drop || classes.includes(decision))) decisions.set(name, decision);
}
cards.forEach(show);
showProgress();
