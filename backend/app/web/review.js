// The operator's page: lists the corrections that people sent, and accepts or discards them.

const $ = (id) => document.getElementById(id);
const TOKEN = "nutrilearn-token"; // kept until the tab is closed

let state = "pending";
const photos = new Map(); // id -> address of the photo in this tab
let shown = 0; // counts the lists, so that a late answer cannot fill a newer one

function element(name, properties, ...children) {
  const node = Object.assign(document.createElement(name), properties);
  node.append(...children);
  return node;
}

const words = (className) => className.replaceAll("_", " ");

async function ask(path, options = {}) {
  const headers = { Authorization: `Bearer ${sessionStorage.getItem(TOKEN) ?? ""}` };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => ({ detail: `the server answered ${response.status}` }));
  if (response.status === 401) sessionStorage.removeItem(TOKEN);
  throw new Error(body.code === "wrong_token" ? "This is not the server's reload token." : body.detail);
}

async function showList() {
  const list = ++shown;
  try {
    const { total, corrections, accepted_photos, needed_photos } = await (await ask(`api/v1/review?state=${state}`)).json();
    if (list !== shown) return;
    $("sign-in").hidden = true;
    $("bar").hidden = false;
    const of = total > corrections.length ? `, the first ${corrections.length} are shown` : "";
    $("count").textContent = total ? `${total} ${state === "pending" ? "waiting" : "accepted"}${of}` : "Nothing here.";
    $("queue").replaceChildren(...corrections.map((item) => card(item, accepted_photos[item.class_name], needed_photos)));
    $("problem").hidden = true;
  } catch (error) {
    showProblem(error);
  }
}

function showProblem(error) {
  $("problem").textContent = error.message;
  $("problem").hidden = false;
  const unknown = sessionStorage.getItem(TOKEN) === null;
  $("sign-in").hidden = !unknown;
  $("bar").hidden = unknown;
  if (unknown) $("queue").replaceChildren();
}

function card(item, acceptedPhotos, neededPhotos) {
  const { id, answer, class_name, food_name, is_new, time } = item;
  const photo = element("img", { alt: `Sent as ${food_name}`, loading: "lazy" });
  showPhoto(photo, id);
  const dish = element("input", { value: words(class_name), maxLength: 60, ariaLabel: "The right dish" });
  dish.setAttribute("list", "dishes");
  const accept = element("button", { className: "button small" }, state === "pending" ? "Accept" : "Rename");
  const discard = element("button", { className: "button quiet small", type: "button" }, "Discard");
  const form = element("form", {}, dish, accept, discard);
  const answered = answer
    ? `Version ${answer.model_version} said ${words(answer.class_name)} (${Math.round(answer.confidence * 100)}%, ${words(answer.verdict)}).`
    : "Sent without an answer.";
  const few = is_new && acceptedPhotos < neededPhotos
    ? ` ${acceptedPhotos} accepted so far; training takes a new dish from ${neededPhotos} on.` : "";
  const note = is_new ? element("p", {}, `New dish.${few}`) : "";
  const row = element("li", { className: "card" }, photo,
    element("p", {}, element("strong", {}, food_name)), element("p", { className: "muted" }, answered),
    note, element("p", { className: "muted" }, new Date(time).toLocaleString()), form);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    decide(row, id, new URLSearchParams({ decision: "accept", dish: dish.value }));
  });
  discard.addEventListener("click", () => decide(row, id, new URLSearchParams({ decision: "discard" })));
  return row;
}

async function showPhoto(image, id) {
  try {
    if (!photos.has(id)) {
      const blob = await (await ask(`api/v1/review/${id}/photo`)).blob();
      photos.set(id, URL.createObjectURL(blob));
    }
    image.src = photos.get(id);
  } catch (error) {
    image.alt = `The photo cannot be shown: ${error.message}`;
  }
}

async function decide(row, id, decision) {
  const buttons = row.querySelectorAll("button");
  for (const button of buttons) button.disabled = true;
  try {
    await ask(`api/v1/review/${id}?${decision}`, { method: "POST" });
    const place = [...$("queue").children].indexOf(row);
    await showList();
    ($("queue").children[place] ?? $("queue").lastElementChild ?? $("bar")).querySelector("button").focus();
  } catch (error) {
    for (const button of buttons) button.disabled = false;
    showProblem(error);
  }
}

function choose(wanted) {
  state = wanted;
  for (const name of ["pending", "accepted"]) $(name).setAttribute("aria-pressed", name === state);
  showList();
}

for (const name of ["pending", "accepted"]) $(name).addEventListener("click", () => choose(name));
$("sign-in").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(TOKEN, $("token").value.trim());
  $("token").value = "";
  showList();
});

async function listDishes() {
  const response = await fetch("api/v1/model").catch(() => null);
  if (!response?.ok) return;
  const { classes } = await response.json();
  $("dishes").replaceChildren(...classes.map((name) => element("option", { value: words(name) })));
}

listDishes();
if (sessionStorage.getItem(TOKEN)) showList();
