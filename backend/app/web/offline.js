// Beside app.js where the server lets browsers answer by themselves: starts the service worker and
// says, in the footer, who answers.

const ONLY_HERE = "nutrilearn-only-here"; // as in worker.js
const HERE = matchMedia("(pointer: coarse)").matches ? "this phone" : "this computer";
const ANSWERED_BY = {
  here: `The last answer came from ${HERE}. Your photo never left it.`,
  server: "The last answer came from the server.",
};
const NOT_STORED = `Some 20 MB could not be stored on ${HERE}, perhaps for lack of room: only the server answers.`;

const words = document.createElement("p"), choice = document.createElement("p");
const box = document.createElement("input"), label = document.createElement("label");
words.id = "who";
words.setAttribute("role", "status");
box.id = "only-here";
box.type = "checkbox";
label.append(box, ` Answer on ${HERE} only: your photo never leaves it.`);
choice.append(label);
choice.hidden = true;
document.getElementById("privacy").after(choice, words);

box.addEventListener("change", () => box.checked ? caches.open(ONLY_HERE) : caches.delete(ONLY_HERE));

// From the service worker: who answered, which model it keeps, or why it keeps none.
async function hear({ data: { answeredBy, version, problem } }) {
  if (answeredBy) return say(ANSWERED_BY[answeredBy]);
  if (problem) return say(`The model could not be loaded onto ${HERE}, so only the server answers: ${problem}.`);
  box.checked = await caches.has(ONLY_HERE);
  choice.hidden = false;
  say(`When the server cannot be reached, ${HERE} answers (model version ${version}).`);
}

function say(text) {
  words.textContent = text;
}

async function start() {
  const { serviceWorker } = navigator;
  if (!serviceWorker) return say("Answers without the server need a page that is opened over HTTPS.");
  if (!globalThis.WebAssembly) return say("This browser has no WebAssembly, so only the server answers.");
  say(`Loading what ${HERE} needs to answer by itself…`);
  serviceWorker.addEventListener("message", hear);
  try {
    const { installing } = await serviceWorker.register("worker.js", { type: "module", updateViaCache: "none" });
    installing?.addEventListener("statechange", () => installing.state === "redundant" && say(NOT_STORED));
  } catch {
    if (!serviceWorker.controller) return say("This browser cannot answer by itself, so only the server answers.");
  }
  (await serviceWorker.ready).active.postMessage("prepare");
}

start();
