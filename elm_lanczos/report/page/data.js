"use strict";
// What the page knows: the run, and its predictions, each read when it is first looked at.

const ARRAYS = {
  float32: Float32Array,
  int32: Int32Array,
  int16: Int16Array,
  int8: Int8Array,
  uint32: Uint32Array,
  uint16: Uint16Array,
  uint8: Uint8Array,
};

const RUN = JSON.parse(document.getElementById("run").textContent);
const SOURCES = [...document.querySelectorAll("script.prediction")];

/** Makes an array of the bytes that `pack` of data.py has written. */
function unpack({ dtype, data }) {
  const text = atob(data);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new ARRAYS[dtype](bytes.buffer);
}

/** Gives an object whose arrays are unpacked when they are first asked for. */
function lazily(packed) {
  const arrays = {};
  return (name) => (arrays[name] ??= unpack(packed[name]));
}

/** One prediction of a prompt: T tokens with k directions each. */
class Prediction {
  constructor(data) {
    Object.assign(this, data);
    this.get = lazily(data.arrays);
    this.layers = data.layers.map((layer) => ({ ...layer, get: lazily(layer.arrays) }));
    this.largest = 0;
    for (const share of this.get("attribution")) {
      if (Math.abs(share) > this.largest) this.largest = Math.abs(share);
    }
  }

  /** A token's text. */
  token(i) {
    return RUN.vocabulary[this.get("token")[i]];
  }

  /** A token's status in words. */
  status(i) {
    return RUN.statuses[this.get("status")[i]];
  }

  /** Whether a token has triplets. */
  solved(i) {
    return !["pending", "not requested"].includes(this.status(i));
  }

  /** A number of one token, or of one of its directions. */
  value(name, i, j) {
    return this.get(name)[j === undefined ? i : i * this.k + j];
  }

  /** The words of a direction with their scores; `side` is "u" or "v". */
  words(side, i, j) {
    const start = (i * this.k + j) * this.top;
    const numbers = this.get(`${side}_word`).subarray(start, start + this.top);
    const scores = this.get(`${side}_score`).subarray(start, start + this.top);
    return Array.from(numbers, (n, r) => ({ text: RUN.vocabulary[n], score: scores[r] })).filter(
      (word) => word.text,
    );
  }

  /** The directions of other tokens that are nearest to one; null where it was not compared. */
  near(side, i, j) {
    if (j >= this.compared) return null;
    const count = this.arrays[`${side}_near`].shape[2];
    const start = (i * this.compared + j) * count;
    const found = [];
    for (let place = start; place < start + count; place++) {
      const index = this.get(`${side}_near`)[place];
      if (index < 0) break;
      found.push({
        token: Math.floor(index / this.compared),
        direction: index % this.compared,
        cosine: this.get(`${side}_cosine`)[place] / RUN.cosine_units,
      });
    }
    return found;
  }

  /** Whether a direction's σ is closer to the next one's than their errors. */
  joined(i, j) {
    if (j + 1 >= this.k) return false;
    const gap = this.value("S", i, j) - this.value("S", i, j + 1);
    return gap <= this.value("error_bound", i, j) + this.value("error_bound", i, j + 1);
  }
}

/** The prompts; `predictions` are numbers of elements, in the order of `positions`. */
const PROMPTS = (() => {
  let first = 0;
  return RUN.prompts.map((prompt) => {
    const predictions = prompt.positions.map((_, n) => first + n);
    first += prompt.positions.length;
    return { ...prompt, predictions };
  });
})();

const READ = new Map();

/** Reads a prediction by its number. */
function predictionNumbered(number) {
  if (!READ.has(number)) READ.set(number, new Prediction(JSON.parse(SOURCES[number].textContent)));
  return READ.get(number);
}

/** What is selected, as the address holds it. */
const STATE = { prompt: 0, position: 0, token: 0, direction: 0, view: "strip", theme: "" };

/** The prediction that is shown. */
function current() {
  return predictionNumbered(PROMPTS[STATE.prompt].predictions[STATE.position]);
}

/** Limits a number to 0 … count - 1. */
function within(number, count) {
  return Math.max(0, Math.min(count - 1, Number.isFinite(number) ? Math.trunc(number) : 0));
}

/** Writes the state as the part of the address behind #. */
function stateToHash() {
  const prompt = PROMPTS[STATE.prompt];
  const entries = {
    prompt: prompt.number,
    position: prompt.positions[STATE.position],
    token: STATE.token,
    direction: STATE.direction + 1,
  };
  if (STATE.view !== "strip") entries.view = STATE.view;
  if (STATE.theme) entries.theme = STATE.theme;
  return `#${new URLSearchParams(entries)}`;
}

/** Reads the state from the address; what it does not hold is chosen. */
function stateFromHash() {
  const given = new URLSearchParams(location.hash.slice(1));
  const number = (name) => (given.has(name) ? Number(given.get(name)) : NaN);
  STATE.prompt = Math.max(0, PROMPTS.findIndex((prompt) => prompt.number === number("prompt")));
  const positions = PROMPTS[STATE.prompt].positions;
  STATE.position = Math.max(0, positions.indexOf(number("position")));
  STATE.view = given.get("view") === "table" ? "table" : "strip";
  STATE.theme = ["light", "dark"].includes(given.get("theme")) ? given.get("theme") : "";
  const prediction = current();
  STATE.token = given.has("token")
    ? within(number("token"), prediction.tokens)
    : leadingToken(prediction);
  STATE.direction = within(number("direction") - 1, prediction.k);
}

/** The token to look at first: that of the largest attribution among those with triplets. */
function leadingToken(prediction) {
  const shares = prediction.get("attribution");
  let best = -1;
  for (let i = 0; i < prediction.tokens; i++) {
    const better = best < 0 || !(Math.abs(shares[i]) <= Math.abs(shares[best]));
    if (prediction.solved(i) && better) best = i;
  }
  return Math.max(0, best);
}
