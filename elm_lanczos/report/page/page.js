// The page itself: what is selected, and what follows from it.

const LISTS = {
  prompts: new VirtualRows($("prompt-list"), 52, promptRow),
  strip: new VirtualRows($("strip"), 38, stripRow),
  table: new VirtualRows($("table-rows"), 32, (row) => tableRow(current(), ORDER.tokens[row])),
};
let starts = [0]; // the first token of every row of the strip
let related = new Set();
const ORDER = { column: 0, falling: false, tokens: [] };

/** Makes one row of the strip. */
function stripRow(row) {
  const prediction = current();
  const last = starts[row + 1] ?? prediction.tokens;
  const tokens = [];
  for (let i = starts[row]; i < last; i++) tokens.push(tokenElement(prediction, i, related));
  return element("div", { class: "row", role: "presentation" }, ...tokens);
}

/** Changes what is selected. What belongs to another prompt or token is chosen anew. */
function choose(changes) {
  const before = { ...STATE };
  Object.assign(STATE, changes);
  if (STATE.prompt !== before.prompt && changes.position === undefined) STATE.position = 0;
  const prediction = current();
  const moved = STATE.prompt !== before.prompt || STATE.position !== before.position;
  if (moved && changes.token === undefined) STATE.token = leadingToken(prediction);
  const other = moved || STATE.token !== before.token;
  if (other && changes.direction === undefined) STATE.direction = moved ? 0 : STATE.direction;
  STATE.token = within(STATE.token, prediction.tokens);
  STATE.direction = within(STATE.direction, prediction.k);
  history.replaceState(null, "", stateToHash());
  if (STATE.theme !== before.theme) return showAll();
  if (moved) showPrompt();
  else showSelection(other);
  if (STATE.view !== before.view) showView();
}

/** Shows everything anew. */
function showAll() {
  if (STATE.theme) document.documentElement.dataset.theme = STATE.theme;
  else delete document.documentElement.dataset.theme;
  showRun();
  showPrompt();
}

/** Shows a prediction. */
function showPrompt() {
  const prediction = current();
  LISTS.prompts.show(PROMPTS.length);
  LISTS.prompts.reveal(STATE.prompt);
  mark($("prompt-list"), `prompt-${STATE.prompt}`);
  showHeading(prediction);
  $("prompt-text").classList.remove("all");
  const long = prediction.tokens > 64;
  if (long) $("tokens").after($("along"));
  else $("direction").after($("along"));
  sortTokens();
  $("strip").scrollTop = 0;
  $("table-rows").scrollTop = 0;
  showView();
  showSelection(true);
  drawOverview($("overview"), prediction, STATE.token, (token) => choose({ token }));
}

/** Shows the selected token and direction. */
function showSelection(other) {
  const prediction = current();
  related = relatives(prediction);
  showToken(prediction);
  if (other) {
    showLayers(prediction);
    revealToken();
    if ($("overview").data) Plotly.relayout($("overview"), { shapes: [selectionLine(STATE.token)] });
  }
  LISTS.strip.refresh();
  LISTS.table.refresh();
  mark($("strip"), `token-${STATE.token}`);
  mark($("table-rows"), `row-${STATE.token}`);
}

/** Scrolls the lists of tokens to the selected one. */
function revealToken() {
  LISTS.strip.reveal(rowOf(STATE.token));
  if (STATE.view === "table") LISTS.table.reveal(ORDER.tokens.indexOf(STATE.token));
}

/** Shows tokens as text or as a table. */
function showView() {
  const table = STATE.view === "table";
  $("strip").hidden = table;
  $("table").hidden = !table;
  $("view-strip").setAttribute("aria-pressed", !table);
  $("view-table").setAttribute("aria-pressed", table);
  if (table) LISTS.table.show(current().tokens);
  else layStrip();
  revealToken();
}

/** Breaks the strip into rows as wide as there is room. */
function layStrip() {
  const frame = $("strip");
  if (!frame.clientWidth) return;
  const ruler = document.createElement("canvas").getContext("2d");
  const style = getComputedStyle(frame);
  ruler.font = `${style.fontSize} ${style.fontFamily}`;
  starts = breakIntoRows(current(), frame.clientWidth - 18, ruler, 20);
  LISTS.strip.show(starts.length);
}

/** The row of the strip in which a token stands. */
function rowOf(token) {
  let [low, high] = [0, starts.length - 1];
  while (low < high) {
    const middle = Math.ceil((low + high) / 2);
    if (starts[middle] <= token) low = middle;
    else high = middle - 1;
  }
  return low;
}

/** Sorts the table of tokens. */
function sortTokens() {
  const prediction = current();
  const value = COLUMNS[ORDER.column][1];
  const keys = Array.from({ length: prediction.tokens }, (_, i) => value(prediction, i));
  const sign = ORDER.falling ? -1 : 1;
  const rank = (i) => (Number.isFinite(keys[i]) ? sign * keys[i] : Infinity); // NaN is always last
  ORDER.tokens = [...keys.keys()].sort((a, b) => (rank(a) === rank(b) ? a - b : rank(a) - rank(b)));
  $("table-head").replaceChildren(
    ...COLUMNS.map(([name], column) => {
      const chosen = column === ORDER.column;
      const arrow = chosen ? (ORDER.falling ? " ↓" : " ↑") : "";
      return element(
        "button",
        { type: "button", "aria-pressed": chosen, title: `Sort by ${name}`, onclick: () => sortBy(column) },
        name + arrow,
      );
    }),
    element("span", {}, "reads (v₁)"),
    element("span", {}, "writes (u₁)"),
  );
}

/** Sorts by a column; by the same once more, the other way. */
function sortBy(column) {
  ORDER.falling = column === ORDER.column ? !ORDER.falling : column > 0;
  ORDER.column = column;
  sortTokens();
  $("table-rows").scrollTop = 0;
  LISTS.table.refresh();
}

/** Moves the selection among the tokens of the strip, up and down by rows. */
function moveInStrip(rows) {
  const row = within(rowOf(STATE.token) + rows, starts.length);
  const last = (starts[row + 1] ?? current().tokens) - 1;
  choose({ token: Math.min(last, starts[row] + STATE.token - starts[rowOf(STATE.token)]) });
}

/** Moves the selection by tokens, in the order in which they are shown. */
function moveToken(step) {
  const sorted = STATE.view === "table";
  const place = sorted ? ORDER.tokens.indexOf(STATE.token) : STATE.token;
  const next = within(place + step, current().tokens);
  choose({ token: sorted ? ORDER.tokens[next] : next });
}

const KEYS = {
  ArrowLeft: () => moveToken(-1),
  ArrowRight: () => moveToken(1),
  j: () => choose({ direction: STATE.direction + 1 }),
  k: () => choose({ direction: STATE.direction - 1 }),
  n: () => choose({ prompt: within(STATE.prompt + 1, PROMPTS.length) }),
  p: () => choose({ prompt: within(STATE.prompt - 1, PROMPTS.length) }),
  t: () => toggleTheme(),
  "/": () => $("query").focus(),
  "?": () => $("notation").showModal(),
};
const LIST_KEYS = {
  "prompt-list": { ArrowUp: () => KEYS.p(), ArrowDown: () => KEYS.n() },
  strip: {
    ArrowUp: () => moveInStrip(-1),
    ArrowDown: () => moveInStrip(1),
    Home: () => choose({ token: 0 }),
    End: () => choose({ token: current().tokens - 1 }),
  },
  "table-rows": {
    ArrowUp: () => moveToken(-1),
    ArrowDown: () => moveToken(1),
    Home: () => moveToken(-current().tokens),
    End: () => moveToken(current().tokens),
    PageUp: () => moveToken(-12),
    PageDown: () => moveToken(12),
  },
  directions: { ArrowUp: () => KEYS.k(), ArrowDown: () => KEYS.j() },
};

/** Answers a key, unless something is being written. */
function answerKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("notation").open) return;
  if (event.target.closest("input, select, textarea")) return;
  const action = LIST_KEYS[event.target.id]?.[event.key] ?? KEYS[event.key];
  if (!action) return;
  event.preventDefault();
  action();
}

/** Changes between light and dark. */
function toggleTheme() {
  const dark = STATE.theme ? STATE.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  choose({ theme: dark ? "light" : "dark" });
}

const FOUND = 40; // results shown of each kind

/** Finds prompts, tokens and words that contain a text. */
function search(text) {
  const query = text.toLowerCase().replace(/^ /, "␣");
  const matching = new Set();
  RUN.vocabulary.forEach((entry, n) => {
    if (entry.toLowerCase().includes(query)) matching.add(n);
  });
  const found = { prompts: [], tokens: [], words: [] };
  const counts = { prompts: 0, tokens: 0, words: 0 };
  const add = (kind, result) => {
    if (counts[kind]++ < FOUND) found[kind].push(result);
  };
  const order = [...new Set([STATE.prompt, ...PROMPTS.keys()])];
  for (const prompt of order) {
    if (PROMPTS[prompt].text.toLowerCase().includes(query)) add("prompts", { prompt });
    if (!matching.size) continue;
    PROMPTS[prompt].predictions.forEach((number, position) => {
      const prediction = predictionNumbered(number);
      prediction.get("token").forEach((n, token) => {
        if (matching.has(n)) add("tokens", { prompt, position, token });
      });
      for (const side of ["v", "u"]) {
        let last = -1; // one result for each direction
        prediction.get(`${side}_word`).forEach((n, place) => {
          const index = Math.floor(place / prediction.top);
          if (n && index !== last && matching.has(n)) {
            last = index;
            const [token, direction] = [Math.floor(index / prediction.k), index % prediction.k];
            add("words", { prompt, position, token, direction, side, text: RUN.vocabulary[n] });
          }
        });
      }
    });
  }
  return { found, counts };
}

/** Shows what a search has found. */
function showFound() {
  const text = $("query").value;
  $("found").hidden = !text;
  if (!text) return;
  const { found, counts } = search(text);
  const titles = { prompts: "Prompts", tokens: "Tokens", words: "Directions with such words" };
  const groups = Object.keys(titles).filter((kind) => counts[kind]);
  const parts = groups.flatMap((kind) => [
    element("h4", {}, `${titles[kind]} `, element("span", { class: "quiet" }, `${counts[kind]}`)),
    ...found[kind].map((result) => foundButton(kind, result)),
    counts[kind] > FOUND ? element("p", { class: "quiet" }, `and ${counts[kind] - FOUND} more`) : "",
  ]);
  $("found").replaceChildren(...(parts.length ? parts : [element("p", { class: "quiet" }, "Nothing found.")]));
}

/** Makes a result of a search. */
function foundButton(kind, { side, text, ...selection }) {
  const prompt = PROMPTS[selection.prompt];
  const made = element("button", { type: "button", onclick: () => (choose(selection), closeFound()) });
  if (kind === "prompts") {
    made.append(element("span", { class: "number" }, `${prompt.number}`), element("bdi", {}, prompt.text));
    return made;
  }
  const prediction = predictionNumbered(prompt.predictions[selection.position]);
  const where = `prompt ${prompt.number} · token ${selection.token}`;
  made.append(word(kind === "words" ? text : prediction.token(selection.token)));
  if (kind === "words") {
    const verb = side === "v" ? "read" : "written";
    made.append(element("span", { class: "quiet" }, ` ${verb} by `), word(prediction.token(selection.token)));
    made.append(element("span", { class: "quiet" }, ` · direction ${selection.direction + 1} · ${where}`));
  } else {
    made.append(element("span", { class: "quiet" }, ` · ${where} · ${signed(prediction.get("attribution")[selection.token])}`));
  }
  return made;
}

/** Ends a search. */
function closeFound() {
  $("found").hidden = true;
  $("query").blur();
}

/** Moves the focus through what was found. */
function moveInFound(event) {
  if (event.key === "Escape") {
    closeFound();
    return;
  }
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step || $("found").hidden) return;
  event.preventDefault();
  const stops = [$("query"), ...$("found").querySelectorAll("button")];
  stops[within(stops.indexOf(document.activeElement) + step, stops.length)].focus();
}

/** Connects the page to mouse, keys, address and size. */
function connect() {
  document.addEventListener("keydown", answerKey);
  document.querySelector(".search").addEventListener("keydown", moveInFound);
  $("strip").addEventListener("click", (event) => {
    const made = event.target.closest("[data-token]");
    if (made) choose({ token: Number(made.dataset.token) });
  });
  $("view-strip").addEventListener("click", () => choose({ view: "strip" }));
  $("view-table").addEventListener("click", () => choose({ view: "table" }));
  $("theme").addEventListener("click", toggleTheme);
  $("help").addEventListener("click", () => $("notation").showModal());
  $("prompt-text").addEventListener("click", () => $("prompt-text").classList.toggle("all"));
  for (const name of ["layer-kind", "layer-figure"]) {
    $(name).addEventListener("change", () => showLayers(current()));
  }
  let waiting = 0;
  $("query").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(showFound, 150);
  });
  document.addEventListener("click", (event) => {
    if (!event.target.closest(".search")) $("found").hidden = true;
  });
  addEventListener("hashchange", () => {
    stateFromHash();
    showAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showAll);
  let width = 0;
  new ResizeObserver(() => {
    if (width === $("tokens").clientWidth) return;
    width = $("tokens").clientWidth;
    showView();
  }).observe($("tokens"));
}

if (matchMedia("(max-width: 900px)").matches) $("prompts").open = false;
stateFromHash();
connect();
showAll();
document.documentElement.dataset.ready = "true";
