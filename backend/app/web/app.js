// The try-it page: sends a photo to /api/v1/predict and shows the answer. No outside requests.

const $ = (id) => document.getElementById(id);
const NUTRIENTS = { calories: "Energy", protein: "Protein", carbs: "Carbohydrates", fat: "Fat", fiber: "Fiber" };
const VERDICTS = {
  confident: "Looks clear",
  unsure: "Not sure: please check",
  not_food: "Does not look like a dish I know",
};
const MATCHES = { close: " (a close match)", proxy: " (values of a similar food)" };
const WORTH_RETRYING = [
  "overloaded", "stopping", "no_model", "upload_too_slow", "malformed_request", "internal_error", "502", "503", "504",
];
const LONGEST_SIDE = 1600; // of what is sent, in pixels; the model sees far fewer
const STORE = "nutrilearn-corrections";
const AGREED = "nutrilearn-agreed"; // that photos with their right dish are kept on the server
const SENT = "nutrilearn-sent"; // what was: {id, token} of each photo

let photo = null; // the file last chosen
let asked = null; // the file that was sent, made smaller, and the id of the request
let answer = null; // what the server said about it
let food = null; // the dish on show: the answer's, or the one the person chose instead
let request = null; // AbortController of the request under way

// Choosing a photo ------------------------------------------------------------------------

for (const id of ["camera", "file"]) {
  $(id).addEventListener("change", (event) => {
    choose(event.target.files[0]);
    event.target.value = ""; // so that the same file can be chosen again
  });
}
document.addEventListener("paste", (event) => choose(event.clipboardData.files[0]));
for (const type of ["dragenter", "dragover"]) {
  document.addEventListener(type, (event) => { event.preventDefault(); $("drop").classList.add("over"); });
}
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  choose(event.dataTransfer.files[0]);
});
$("retry").addEventListener("click", () => choose(photo));

function choose(file) {
  if (!file) return;
  photo = file;
  $("where").setAttribute("aria-pressed", false); // the heat goes with its photo
  hideHeat();
  URL.revokeObjectURL($("preview").src);
  $("preview").src = URL.createObjectURL(file);
  $("preview").hidden = false;
  $("invitation").hidden = true;
  ask(file);
}
// Some pictures the server reads cannot be shown here, and the other way round.
$("preview").addEventListener("error", () => { $("preview").hidden = true; $("invitation").hidden = false; });

// Asking ----------------------------------------------------------------------------------

async function ask(file) {
  request?.abort();
  const { signal } = request = new AbortController();
  show("status", "Looking at your photo…");
  try {
    const form = new FormData();
    const small = await shrunk(file);
    form.append("file", small);
    const response = await fetch("api/v1/predict", { method: "POST", body: form, signal });
    const body = await response.json().catch(() => ({ code: String(response.status) }));
    if (signal.aborted) return;
    if (response.ok) {
      asked = { file: small, requestId: response.headers.get("X-Request-ID") };
      return showAnswer(body);
    }
    showError(explain(body), WORTH_RETRYING.includes(body.code));
  } catch (error) {
    if (error.name === "AbortError") return;
    showError("The server could not be reached, or the connection was lost.", true);
  }
}

// A phone's photo, made smaller before it is sent. The browser turns it upright, as <img> does;
// what it cannot show, HEIC for example, is sent as it is.
async function shrunk(file) {
  const picture = new Image();
  picture.src = URL.createObjectURL(file);
  try {
    await picture.decode();
    const scale = LONGEST_SIDE / Math.max(picture.naturalWidth, picture.naturalHeight);
    if (scale >= 1) return file;
    const canvas = element("canvas");
    canvas.width = Math.max(1, Math.round(picture.naturalWidth * scale));
    canvas.height = Math.max(1, Math.round(picture.naturalHeight * scale));
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.fillStyle = "white"; // behind what is transparent, as on the server
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(picture, 0, 0, canvas.width, canvas.height);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.9));
    return blob ? new File([blob], "photo.jpg", { type: blob.type }) : file;
  } catch {
    return file;
  } finally {
    URL.revokeObjectURL(picture.src);
  }
}

function explain({ code, detail }) {
  const tooLarge = "This picture is too large. Please choose a smaller one.";
  const stopped = "The server is being restarted. Please try again in a moment.";
  const words = {
    unsupported_image: "This file is not a picture I can read. JPEG, PNG, WebP, GIF, AVIF and HEIC work.",
    unreadable_image: "This picture is damaged or incomplete. Please try another one.",
    malformed_request: "The photo did not arrive in one piece. Please try again.",
    too_large: tooLarge,
    413: tooLarge, // from a proxy that answers without JSON, as all numbers here
    too_many_corrections: "That was quick. Please wait a minute before you send more.",
    feedback_full: "Thank you, but there is no room for more photos just now.",
    feedback_not_stored: "The photo could not be kept: the server has a problem with its disk.",
    overloaded: "Many photos are waiting just now. Please try again in a moment.",
    no_model: "This server has no trained model yet, so it cannot answer.",
    stopping: stopped,
    502: stopped,
    503: stopped,
    504: "The server did not answer in time. Please try again.",
    upload_too_slow: "The upload took too long. Please try again with a better connection.",
    internal_error: "Something went wrong on the server. Please try again.",
  };
  return words[code] ?? `That did not work: ${detail ?? `the server answered ${code}.`}`;
}

function show(id, text) {
  for (const part of ["status", "error", "result"]) $(part).hidden = part !== id;
  if (text) $(id).textContent = text;
}

function showError(text, retry = false) {
  $("error").querySelector("p").textContent = text;
  $("retry").hidden = !retry;
  show("error");
}

// Showing the answer ----------------------------------------------------------------------

function showAnswer(body) {
  answer = body;
  $("guesses").replaceChildren(...body.top_predictions.map(guessRow));
  $("guesses-title").textContent = body.verdict === "not_food" ? "If it is a dish after all" : "What the model saw";
  for (const field of ["other", "dish"]) $(field).value = "";
  $("taught").hidden = true;
  $("looked").hidden = $("preview").hidden || body.verdict === "not_food";
  showFood(body);
  show("result");
  $("result").focus({ preventScroll: true });
  if (matchMedia("(max-width: 48rem)").matches) $("answer").scrollIntoView({ behavior: "smooth" });
}

// Where it looked -------------------------------------------------------------------------

const DARKEST = 0.75; // how much of the light is taken from what says nothing for the dish

$("where").addEventListener("click", async () => {
  if ($("where").getAttribute("aria-pressed") === "true") return hideHeat();
  const about = answer, picture = photo;
  $("where-words").textContent = "One moment…";
  const form = new FormData();
  form.append("file", asked.file, "photo");
  // With the id of the first answer the server counts the photo once.
  const headers = asked.requestId ? { "X-Request-ID": asked.requestId } : {};
  try {
    const response = await fetch("api/v1/predict?explain=true", { method: "POST", body: form, headers });
    const body = await response.json().catch(() => ({ code: String(response.status) }));
    if (answer !== about) return; // another photo was chosen meanwhile
    if (!response.ok) $("where-words").textContent = explain(body);
    else if (!body.activation.grid) $("where-words").textContent = "This model cannot say.";
    else await showHeat(body.activation, picture);
  } catch {
    if (answer === about) $("where-words").textContent = "The server could not be reached.";
  }
});

async function showHeat({ grid, side }, picture) {
  const { naturalWidth: width, naturalHeight: height } = $("preview");
  if (!width) return $("where-words").textContent = "This browser cannot show the picture.";
  const canvas = element("canvas"), shade = element("canvas");
  const scale = Math.min(1, LONGEST_SIDE / Math.max(width, height));
  canvas.width = shade.width = width * scale;
  canvas.height = shade.height = height * scale;
  const seen = side * Math.min(canvas.width, canvas.height);
  const square = [(canvas.width - seen) / 2, (canvas.height - seen) / 2, seen, seen];
  const context = shade.getContext("2d");
  context.fillStyle = `rgb(0 0 0 / ${DARKEST})`;
  context.fillRect(0, 0, shade.width, shade.height);
  context.clearRect(...square);
  context.imageSmoothingQuality = "high";
  context.drawImage(shades(grid), ...square);
  canvas.getContext("2d").drawImage($("preview"), 0, 0, canvas.width, canvas.height);
  canvas.getContext("2d").drawImage(shade, 0, 0);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.9));
  if (picture !== photo) return;
  URL.revokeObjectURL($("preview").src);
  $("preview").src = URL.createObjectURL(blob);
  $("where").setAttribute("aria-pressed", true);
  $("where").textContent = "Show the photo again";
  $("where-words").textContent = `Bright: what speaks for ${$("guesses").querySelector(".text").textContent}.`;
}

// One pixel for each place, which the browser smooths when it makes them larger.
function shades(grid) {
  const canvas = element("canvas");
  [canvas.width, canvas.height] = [grid[0].length, grid.length];
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  grid.flat().forEach((value, i) => { image.data[4 * i + 3] = 255 * DARKEST * (1 - value ** 1.5); });
  context.putImageData(image, 0, 0);
  return canvas;
}

function hideHeat() {
  const shown = $("where").getAttribute("aria-pressed") === "true";
  $("where").setAttribute("aria-pressed", false);
  $("where").textContent = "Where did it look?";
  $("where-words").textContent = "";
  if (!shown) return;
  URL.revokeObjectURL($("preview").src);
  $("preview").src = URL.createObjectURL(photo);
}

function guessRow({ class_name, food_name, confidence }) {
  const percent = `${Math.round(confidence * 100)}%`;
  const row = element("li", element("button", element("span"), element("span", food_name), element("span", percent)));
  const button = row.firstChild;
  const [bar, ...texts] = button.children;
  bar.className = "bar";
  bar.style.width = `${confidence * 100}%`;
  for (const text of texts) text.className = "text";
  button.type = "button";
  button.dataset.className = class_name;
  button.addEventListener("click", () => correct(class_name));
  return row;
}

function element(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}

function showFood(shown) {
  food = shown;
  const chosen = food !== answer;
  const unknown = answer.verdict === "not_food" && !chosen;
  $("verdict").textContent = chosen ? "Your choice" : VERDICTS[answer.verdict];
  $("verdict").classList.toggle("sure", chosen || answer.verdict === "confident");
  $("food").textContent = unknown ? "No dish found" : food.food_name;
  $("kind").textContent = unknown
    ? "Try a photo that shows the dish closer and from above."
    : [food.cuisine, food.category?.replace("_", " ")].filter(Boolean).join(" · ");
  for (const button of $("guesses").querySelectorAll("button")) {
    button.setAttribute("aria-pressed", !unknown && button.dataset.className === food.class_name);
  }
  showNutrition(unknown);
}

function showNutrition(unknown) {
  const known = food.nutrition_per_100g !== null;
  $("nutrition").hidden = !known;
  $("no-nutrition").hidden = known || unknown;
  $("no-nutrition").textContent = `There is no sourced nutrition for ${food.food_name}, so none is shown.`;
  if (!known) return;
  $("portion").max = Math.max(300, food.serving_g * 3);
  $("portion").value = food.serving_g;
  $("source").textContent = food.nutrition_source + (MATCHES[food.nutrition_match] ?? "");
  showPortion(food.serving_g);
}

$("portion").addEventListener("input", () => showPortion(Number($("portion").value)));

function showPortion(grams) {
  const servings = grams / food.serving_g;
  const usual = Math.abs(servings - 1) < 0.02;
  $("grams").textContent = `${grams} g`;
  $("portion-words").textContent = usual ? "a usual serving" : `${servings.toFixed(1)} servings`;
  $("calories").textContent = Math.round(food.nutrition_per_100g.calories * (grams / 100));
  $("nutrients").replaceChildren(...Object.entries(NUTRIENTS).map(([key, name]) => {
    const amount = food.nutrition_per_100g[key];
    const words = (value) => key === "calories" ? `${Math.round(value)} kcal` : `${value.toFixed(1)} g`;
    const row = element("tr", element("th", name), element("td", words(amount * (grams / 100))), element("td", words(amount)));
    row.firstChild.scope = "row";
    return row;
  }));
}

// Correcting it ---------------------------------------------------------------------------

$("other").addEventListener("change", () => $("other").value && correct($("other").value));

async function correct(className) {
  if (className === answer.class_name && answer.verdict !== "not_food") {
    showFood(answer);
  } else {
    try {
      const response = await fetch(`api/v1/foods/${encodeURIComponent(className)}`);
      const body = await response.json();
      if (!response.ok) return showError(explain(body));
      showFood(body);
    } catch {
      return showError("The server could not be reached.");
    }
  }
  if (teaching()) teach(className);
  else if ($("consent").checked) remember(className);
}

const corrections = () => JSON.parse(localStorage.getItem(STORE) ?? "[]");

function remember(className) {
  const { class_name: predicted, confidence, verdict, model_version, timestamp } = answer;
  const entry = { predicted, corrected: className, confidence, verdict, model_version, timestamp };
  const others = corrections().filter((kept) => kept.timestamp !== timestamp); // the last word counts
  localStorage.setItem(STORE, JSON.stringify([...others, entry]));
  showKept();
}

$("consent").addEventListener("change", () => $("consent").checked && food !== answer && remember(food.class_name));
$("forget").addEventListener("click", () => { localStorage.removeItem(STORE); showKept(); });

function showKept() {
  const kept = corrections();
  $("kept").hidden = kept.length === 0;
  $("kept").querySelector("span").textContent = `${kept.length} kept in this browser.`;
  URL.revokeObjectURL($("download").href);
  $("download").href = URL.createObjectURL(new Blob([JSON.stringify(kept, null, 2)], { type: "application/json" }));
}

// Letting the model learn from it ---------------------------------------------------------

const teaching = () => !$("teach").hidden && $("share").checked;
const sent = () => JSON.parse(localStorage.getItem(SENT) ?? "[]");

async function teach(dish) {
  const { file, requestId } = asked;
  try {
    let [response, body] = await sendCorrection(file, dish, requestId);
    // The server has been restarted since, and no longer knows what it had answered.
    if (body.code === "unknown_answer") [response, body] = await sendCorrection(file, dish);
    if (!response.ok) return say(explain(body), true);
    const others = sent().filter(({ id }) => id !== body.id); // a photo is kept once
    localStorage.setItem(SENT, JSON.stringify([...others, { id: body.id, token: body.token }]));
    say(`Thank you. Your photo is kept as ${body.food_name}.`);
  } catch {
    say("The server could not be reached, so your photo was not kept.", true);
  }
}

async function sendCorrection(file, dish, requestId) {
  const form = new FormData();
  form.append("file", file, "photo"); // not the file's own name
  form.append("dish", dish);
  form.append("consent", "true");
  if (requestId) form.append("request_id", requestId);
  const response = await fetch("api/v1/feedback", { method: "POST", body: form });
  return [response, await response.json().catch(() => ({ code: String(response.status) }))];
}

function say(text, failed = false) {
  $("taught").textContent = text;
  $("taught").classList.toggle("notice", failed);
  $("taught").hidden = false;
  showSent();
}

function showSent() {
  const count = sent().length;
  $("sent").hidden = count === 0;
  $("sent").querySelector("span").textContent =
    count === 1 ? "1 photo of yours is kept on the server." : `${count} photos of yours are kept on the server.`;
}

$("share").addEventListener("change", () => {
  const agreed = $("share").checked;
  if (agreed) localStorage.setItem(AGREED, "true");
  else localStorage.removeItem(AGREED);
  $("name-dish").hidden = !agreed;
  if (agreed && food !== answer) teach(food.class_name);
});

$("name-dish").addEventListener("submit", (event) => {
  event.preventDefault();
  const dish = $("dish").value.trim();
  if (dish) teach(dish);
});

$("take-back").addEventListener("click", async () => {
  const left = [];
  for (const receipt of sent()) {
    const headers = { Authorization: `Bearer ${receipt.token}` };
    const response = await fetch(`api/v1/feedback/${receipt.id}`, { method: "DELETE", headers }).catch(() => null);
    if (!(response?.ok || response?.status === 404)) left.push(receipt);
  }
  localStorage.setItem(SENT, JSON.stringify(left));
  if (left.length) say("Not everything could be deleted. Please try again.", true);
  else say("Deleted from the server.");
});

function offerTeaching() {
  $("teach").hidden = false;
  $("local").hidden = true;
  $("share").checked = localStorage.getItem(AGREED) !== null;
  $("name-dish").hidden = !$("share").checked;
  $("privacy").textContent = "Your photo is not stored on the server, unless you agree to it and correct an answer.";
  showSent();
}

// At start --------------------------------------------------------------------------------

async function describeModel() {
  try {
    const response = await fetch("api/v1/model");
    const body = await response.json();
    if (!response.ok) return showBanner();
    if (body.feedback) offerTeaching();
    $("model").textContent = `Model version ${body.version} (${body.runtime === "torch" ? "PyTorch" : body.runtime.toUpperCase()}), ${body.classes.length} dishes.`;
    for (const name of [...body.classes].sort()) {
      const words = name.replaceAll("_", " ");
      $("other").append(new Option(words[0].toUpperCase() + words.slice(1), name));
    }
  } catch {
    showError("The server could not be reached.");
  }
}

function showBanner() {
  const code = element("code", "python backend/train_model.py --sample");
  $("banner").replaceChildren("This server has no trained model yet. Train one with ", code, ", then start the server again.");
  $("banner").hidden = false;
}

describeModel();
showKept();
