// ---- confusion matrix: only its cells that are not zero, [actual, predicted, count]
const { classes, supports, cells } = JSON.parse($("matrix-data").textContent);
const n = classes.length;
const byActual = classes.map(() => new Map()), byPredicted = classes.map(() => new Map());
for (const [i, j, count] of cells) { byActual[i].set(j, count); byPredicted[j].set(i, count); }
const countOf = (i, j) => byActual[i].get(j) || 0;
const share = (i, j) => (supports[i] ? countOf(i, j) / supports[i] : 0);
const percent = (x) => (100 * x).toFixed(x > 0 && x < 0.1 ? 1 : 0) + "%";

const orders = {
  name: () => classes.map((_, i) => i),
  hardest: () => orders.name().sort((a, b) => share(a, a) - share(b, b)),
  together: () => { // start at the hardest class, then always the class most confused with the last one
    const rest = orders.hardest(), chain = [rest.shift()];
    const tie = (i, j) => countOf(i, j) + countOf(j, i);
    while (rest.length) {
      const last = chain[chain.length - 1];
      const next = rest.reduce((best, i) => (tie(last, i) > tie(last, best) ? i : best), rest[0]);
      chain.push(rest.splice(rest.indexOf(next), 1)[0]);
    }
    return chain;
  },
};

// One canvas, never larger than the window, shows the part of the matrix that is scrolled to: browsers
// leave a canvas blank beyond 16,384 pixels, and a phone sooner.
const box = $("matrix"), plane = box.firstElementChild, canvas = plane.firstElementChild;
const SMALLEST = 9, LARGEST = 56; // pixels a cell, at first and at most
const CORNER = 76; // pixels for the names of the axes
let order = orders.name(), place = order, zoom = 1, at = null; // place: where a class stands in the order
let size, room, ink, paper, line, right, wrong;

function color(name) { // canvas knows no CSS variables: let the browser resolve them
  const probe = document.createElement("i");
  probe.style.color = "var(--" + name + ")";
  box.append(probe);
  const value = getComputedStyle(probe).color;
  probe.remove();
  return value;
}

const font = (px) => px + "px system-ui, sans-serif";
// readable: pixels a cell that hold a name; dots: canvas pixels a pixel
const onScreen = () => ({ available: box.parentElement.clientWidth - 12, readable: 8, dots: Math.min(devicePixelRatio || 1, 2), isWhole: false });
const onPaper = { available: 650, readable: 4.5, dots: 4, isWhole: true };
let view = onScreen();

function layOut(as = onScreen()) { // how large the cells are, and how much room their names take
  view = as;
  [ink, paper, line, right, wrong] = ["ink", "card", "line", "right", "wrong"].map(color);
  const context = canvas.getContext("2d");
  context.font = font(12.5);
  const longest = Math.max(...classes.map((name) => context.measureText(name).width));
  const names = Math.ceil(Math.min(view.available < 500 ? 96 : 150, Math.max(52, longest)) + 12);
  const fit = (space) => (view.available - space) / n;
  size = Math.min(LARGEST, fit(names));
  if (!view.isWhole) size = Math.min(LARGEST, Math.max(SMALLEST, size) * zoom);
  size = Math.max(size, Math.min(SMALLEST, fit(CORNER))); // small enough to see it whole
  if (!view.isWhole && size >= view.readable) size = Math.floor(size);
  room = size >= view.readable ? names : CORNER;
  plane.style.width = plane.style.height = room + size * n + "px";
  $("matrix-note").hidden = size >= view.readable;
  draw();
}

function draw() {
  const width = view.isWhole ? room + size * n : Math.min(box.clientWidth, room + size * n);
  const height = view.isWhole ? room + size * n : Math.min(box.clientHeight, room + size * n);
  canvas.width = width * view.dots; canvas.height = height * view.dots;
  canvas.style.width = width + "px"; canvas.style.height = height + "px";
  const context = canvas.getContext("2d");
  context.scale(view.dots, view.dots);
  context.textBaseline = "middle";
  const left = view.isWhole ? 0 : box.scrollLeft, top = view.isWhole ? 0 : box.scrollTop;
  const seen = (from, length) => [Math.max(0, Math.floor(from / size)), Math.min(n, Math.ceil((from + length - room) / size))];
  const columns = seen(left, width), rows = seen(top, height);
  within(context, room, room, width - room, height - room, () => { context.translate(room - left, room - top); drawCells(context, columns, rows); });
  if (size >= view.readable) {
    within(context, 0, room, room, height - room, () => drawNames(context, rows, room - top));
    within(context, room, 0, width - room, room, () => { context.rotate(-Math.PI / 2); context.translate(-room, 0); drawNames(context, columns, room - left, true); });
  }
  context.font = font(11.5); context.fillStyle = ink; context.textAlign = "right";
  context.fillText("predicted →", room - 6, room - 22); context.fillText("actual ↓", room - 6, room - 8);
}

function within(context, x, y, width, height, paint) {
  context.save();
  context.beginPath(); context.rect(x, y, width, height); context.clip();
  paint();
  context.restore();
}

function drawNames(context, [first, last], start, turned = false) {
  context.font = font(Math.min(12.5, size)); context.fillStyle = ink; context.textAlign = turned ? "left" : "right";
  for (let k = first; k < last; k++)
    context.fillText(shortened(context, classes[order[k]]), turned ? 6 : room - 6, start + (k + 0.5) * size);
}

function shortened(context, text) {
  if (context.measureText(text).width <= room - 10) return text;
  while (text && context.measureText(text + "…").width > room - 10) text = text.slice(0, -1);
  return text + "…";
}

function drawCells(context, columns, rows) {
  drawGuides(context, columns, rows);
  context.font = font(Math.min(14, size * 0.42)); context.textAlign = "center";
  const onlyMistakes = $("mistakes-only").checked, gap = size >= 5 ? 1 : 0;
  for (let y = rows[0]; y < rows[1]; y++) {
    const i = order[y];
    for (const [j, count] of byActual[i]) {
      const x = place[j];
      if (x < columns[0] || x >= columns[1] || (i === j && onlyMistakes)) continue;
      // the square root lets a mistake of 2% be seen beside one of 40%
      const alpha = i === j ? 0.12 + 0.88 * share(i, j) : Math.min(1, 0.2 + (onlyMistakes ? 1.6 : 1.2) * Math.sqrt(share(i, j)));
      context.globalAlpha = alpha; context.fillStyle = i === j ? right : wrong;
      context.fillRect(x * size + gap, y * size + gap, Math.max(1, size - gap), Math.max(1, size - gap));
      if (size < 20) continue;
      context.globalAlpha = 1; context.fillStyle = alpha > 0.7 ? paper : ink;
      context.fillText(count, (x + 0.5) * size, (y + 0.54) * size);
    }
  }
  context.globalAlpha = 0.55; context.strokeStyle = ink;
  if (at) { context.strokeRect(0.5, at[1] * size + 0.5, size * n, size); context.strokeRect(at[0] * size + 0.5, 0.5, size, size * n); }
}

function drawGuides(context, columns, rows) {
  const every = n > 300 ? 50 : n > 30 ? 5 : 1, side = size * n; // few lines in a fine grid
  context.strokeStyle = line; context.lineWidth = 1;
  context.beginPath();
  for (let k = 0; k <= n; k += every) {
    const z = Math.round(k * size) + 0.5;
    if (k >= rows[0] && k <= rows[1]) { context.moveTo(0, z); context.lineTo(side, z); }
    if (k >= columns[0] && k <= columns[1]) { context.moveTo(z, 0); context.lineTo(z, side); }
  }
  context.stroke();
}

// ---- what the cell or the class says in words
function say(element, parts) { // pairs of [tag, text]; textContent keeps every name text
  element.replaceChildren(...parts.map(([tag, text]) => Object.assign(document.createElement(tag), { textContent: text })));
}

function point(cell) {
  at = cell;
  draw();
  const i = order[at[1]], j = order[at[0]];
  const amount = countOf(i, j) + " of " + supports[i] + (supports[i] ? " (" + percent(share(i, j)) + ")" : "");
  say($("readout"), i === j ? [["b", classes[i]], ["span", " recognized: " + amount]]
    : [["b", classes[i]], ["span", " taken for "], ["b", classes[j]], ["span", ": " + amount]]);
}

function closeUp(c) {
  $("one-class").selectedIndex = c;
  const others = (counts) => [...counts].filter(([k]) => k !== c).sort((a, b) => b[1] - a[1]);
  const rows = [["recognized", countOf(c, c) + " of " + supports[c]],
    ...others(byActual[c]).map(([k, count]) => ["taken for " + classes[k], count + " of " + supports[c]]),
    ...others(byPredicted[c]).map(([k, count]) => [classes[k] + " taken for it", count + " of " + supports[k]])];
  $("one-class-list").replaceChildren(...rows.map((row) => {
    const item = document.createElement("li");
    say(item, row.map((text) => ["span", text]));
    return item;
  }));
}

const inside = (v) => Math.max(0, Math.min(n - 1, v));
const cellAt = (event) => [inside(Math.floor((event.offsetX - room + box.scrollLeft) / size)), inside(Math.floor((event.offsetY - room + box.scrollTop) / size))];
canvas.addEventListener("pointermove", (event) => { if (event.offsetX > room && event.offsetY > room) point(cellAt(event)); });
canvas.addEventListener("click", (event) => closeUp(order[event.offsetY > room ? cellAt(event)[1] : cellAt(event)[0]]));
box.addEventListener("scroll", () => requestAnimationFrame(draw));
box.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (event.key === "Enter" && at) closeUp(order[at[1]]);
  if (!step) return;
  event.preventDefault();
  point(at ? [inside(at[0] + step[0]), inside(at[1] + step[1])] : [0, 0]);
  const inView = (now, k, length) => Math.max(Math.min(now, k * size), (k + 1) * size - length + room);
  box.scrollLeft = inView(box.scrollLeft, at[0], box.clientWidth);
  box.scrollTop = inView(box.scrollTop, at[1], box.clientHeight);
});
$("order").addEventListener("change", (event) => {
  order = orders[event.target.value]();
  place = new Array(n);
  order.forEach((c, k) => { place[c] = k; });
  at = null;
  draw();
});
$("mistakes-only").addEventListener("change", () => draw());
const zoomBy = (factor) => { zoom = Math.max(0.05, Math.min(6, zoom * factor)); layOut(); };
$("larger").addEventListener("click", () => zoomBy(1.4));
$("smaller").addEventListener("click", () => zoomBy(1 / 1.4));
$("one-class").addEventListener("change", (event) => closeUp(event.target.selectedIndex));
window.addEventListener("resize", () => layOut());
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => layOut());
document.addEventListener("themechange", () => layOut());
let screenScheme;
window.addEventListener("beforeprint", () => { screenScheme = root.style.colorScheme; root.style.colorScheme = "light"; layOut(onPaper); });
window.addEventListener("afterprint", () => { root.style.colorScheme = screenScheme; layOut(); });
layOut();
closeUp(classes.reduce((worst, _, i) => (supports[i] && share(i, i) < share(worst, worst) ? i : worst), supports.findIndex((s) => s)));

// ---- training curves: one epoch at a time, in all charts at once
const charts = [...document.querySelectorAll(".chart[data-x]")].map((figure) => ({
  svg: figure.querySelector("svg"), cursor: figure.querySelector(".cursor"), x: JSON.parse(figure.dataset.x),
  outputs: [...figure.querySelectorAll("output")].map((o) => [o, JSON.parse(o.dataset.text), o.textContent]),
}));
function showEpoch(epoch) {
  for (const chart of charts) {
    chart.cursor.setAttribute("x1", epoch === null ? -9 : chart.x[epoch]);
    chart.cursor.setAttribute("x2", epoch === null ? -9 : chart.x[epoch]);
    for (const [output, text, resting] of chart.outputs) output.textContent = epoch === null ? resting : text[epoch];
  }
}
for (const { svg, x } of charts) {
  svg.addEventListener("pointermove", (event) => {
    const here = (event.offsetX / svg.clientWidth) * svg.viewBox.baseVal.width;
    showEpoch(Object.keys(x).reduce((best, e) => (Math.abs(x[e] - here) < Math.abs(x[best] - here) ? e : best)));
  });
  svg.addEventListener("pointerleave", () => showEpoch(null));
}
