// The model in the browser: from a photo to what the server would answer.

import * as ort from "../offline/ort.wasm.bundle.min.mjs";

const FILTERS = { // reach, and weight at a distance, as in Pillow
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  bicubic: [2, (x) => {
    const d = Math.abs(x);
    if (d < 1) return (1.5 * d - 2.5) * d * d + 1;
    return d < 2 ? ((-0.5 * d + 2.5) * d - 4) * d + 2 : 0;
  }],
};
const DRAFT_SIDE = 512; // the server decodes a JPEG at the smallest scale with a short side of this
const TOP = 3;
const NUTRITION = ["nutrition", "serving_g", "nutrition_per_100g", "nutrition_source", "nutrition_match"];

ort.env.wasm.numThreads = 1; // more need headers that keep the page from others

// runtime, model: ArrayBuffers of the .wasm and the .onnx file. facts: the server's offline/facts.
export async function load(runtime, model, facts) {
  ort.env.wasm.wasmBinary = runtime;
  const session = await ort.InferenceSession.create(new Uint8Array(model));
  const bytes = Uint8Array.from(atob(facts.centroids), (letter) => letter.charCodeAt(0));
  return { session, facts, centroids: new Float32Array(bytes.buffer) }; // one class after another
}

// The answer of POST /api/v1/predict.
export async function answer(model, photo) {
  const { facts } = model, { classes, version } = facts.model;
  const { probabilities, similarity } = await recognize(model, photo);
  const order = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]);
  const top = order.slice(0, TOP).map((i) => ({
    class_name: classes[i], food_name: facts.foods[classes[i]].food_name, confidence: probabilities[i],
  }));
  const sure = top[0].confidence >= facts.decision.confident_at ? "confident" : "unsure";
  const verdict = similarity < facts.decision.food_at ? "not_food" : sure;
  const food = { ...facts.foods[top[0].class_name] };
  if (verdict === "not_food") for (const name of NUTRITION) food[name] = null;
  return {
    ...food, confidence: top[0].confidence, verdict, top_predictions: top, model_version: version,
    timestamp: new Date().toISOString(),
  };
}

// The calibrated probability of each class, and how close the photo is to the nearest one.
export async function recognize({ session, facts, centroids }, photo) {
  const { preprocessing } = facts.model, { crop } = preprocessing;
  const values = normalized(await pixelsOf(photo, preprocessing), preprocessing);
  const images = new ort.Tensor("float32", values, [1, 3, crop, crop]);
  const outputs = await session.run({ [session.inputNames[0]]: images });
  const [logits, pooled] = session.outputNames.map((name) => outputs[name].data);
  const scaled = Array.from(logits, (logit) => logit / facts.decision.temperature);
  const largest = Math.max(...scaled), powers = scaled.map((value) => Math.exp(value - largest));
  const sum = powers.reduce((a, b) => a + b), length = Math.hypot(...pooled);
  const cosines = scaled.map((_, i) =>
    pooled.reduce((total, value, j) => total + value * centroids[i * pooled.length + j], 0) / length);
  return { probabilities: powers.map((power) => power / sum), similarity: Math.max(...cosines) };
}

// Rounded to 32 bits after each step, as on the server: INT8 turns other roundings into other answers.
function normalized(pixels, { mean, std }) {
  const count = pixels.length / 3, values = new Float32Array(pixels.length), round = Math.fround;
  for (let c = 0; c < 3; c++) {
    const [average, spread] = [round(mean[c]), round(std[c])];
    const table = Float32Array.from({ length: 256 }, (_, v) => round(round(v / 255) - average) / spread);
    for (let i = 0; i < count; i++) values[c * count + i] = table[pixels[3 * i + c]];
  }
  return values;
}

// Pixels ----------------------------------------------------------------------------------

// The middle of the photo, resized: crop x crop pixels of red, green, blue, to within a gray level of
// the server's. The browser's own resizing differs by more.
export async function pixelsOf(photo, { resize, crop, interpolation }) {
  let picture = await decoded(photo);
  if (photo.type === "image/jpeg") picture = reduced(picture);
  const short = Math.min(picture.width, picture.height);
  const [across, down] = [picture.width, picture.height].map((size) => {
    const whole = Math.floor(resize * size / short);
    return taps(size, whole, roundHalfToEven((whole - crop) / 2), crop, FILTERS[interpolation]);
  });
  return weighted(picture, across, down);
}

// Upright, in sRGB, transparency laid on white.
async function decoded(photo) {
  const bitmap = await createImageBitmap(photo), { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  return context.getImageData(0, 0, width, height);
}

// At a half, a quarter or an eighth, where the server would decode it so.
function reduced({ width, height, data }) {
  const least = DRAFT_SIDE / Math.min(width, height);
  const fits = Math.min(...[width, height].map((size) => Math.floor(size / Math.round(size * least))));
  const scale = [8, 4, 2].find((each) => each <= fits);
  if (!scale) return { width, height, data };
  const small = new ImageData(Math.ceil(width / scale), Math.ceil(height / scale));
  for (let y = 0; y < small.height; y++) {
    for (let x = 0; x < small.width; x++) {
      const right = Math.min(width, (x + 1) * scale), bottom = Math.min(height, (y + 1) * scale);
      let red = 0, green = 0, blue = 0;
      for (let v = y * scale; v < bottom; v++) {
        for (let i = 4 * (v * width + x * scale); i < 4 * (v * width + right); i += 4) {
          red += data[i];
          green += data[i + 1];
          blue += data[i + 2];
        }
      }
      const count = (right - x * scale) * (bottom - y * scale);
      small.data.set([red / count, green / count, blue / count], 4 * (y * small.width + x));
    }
  }
  return small;
}

const roundHalfToEven = (value) => value % 1 === 0 ? value : 2 * Math.round(value / 2);

// For `count` pixels from `first` on, of `from` pixels resized to `to`: where each one's sources begin,
// and their weights.
function taps(from, to, first, count, [reach, weight]) {
  const scale = from / to, stretch = Math.max(scale, 1);
  return Array.from({ length: count }, (_, i) => {
    const center = (first + i + 0.5) * scale;
    const start = Math.max(0, Math.floor(center - reach * stretch + 0.5));
    const end = Math.min(from, Math.floor(center + reach * stretch + 0.5));
    const weights = Array.from({ length: end - start }, (_, k) => weight((start + k - center + 0.5) / stretch));
    const sum = weights.reduce((a, b) => a + b);
    return { start, weights: weights.map((each) => each / sum) };
  });
}

// Rows first, then columns, rounded to gray levels after each, as Pillow does.
function weighted({ width, data }, across, down) {
  const top = down[0].start, last = down.at(-1), rows = last.start + last.weights.length - top;
  const narrow = new Uint8ClampedArray(3 * rows * across.length);
  const small = new Uint8ClampedArray(3 * down.length * across.length);
  const sumOf = (weights, pixels, index, step) => {
    let sum = 0;
    for (let k = 0; k < weights.length; k++) sum += weights[k] * pixels[index + k * step];
    return sum;
  };
  const row = 3 * across.length;
  for (let y = 0; y < rows; y++) {
    across.forEach(({ start, weights }, x) => {
      for (let c = 0; c < 3; c++) {
        narrow[y * row + 3 * x + c] = sumOf(weights, data, 4 * ((top + y) * width + start) + c, 4);
      }
    });
  }
  down.forEach(({ start, weights }, y) => {
    for (let i = 0; i < row; i++) small[y * row + i] = sumOf(weights, narrow, (start - top) * row + i, row);
  });
  return small;
}
