// What stands in the panels: prompts, tokens, a token's directions, a direction's relatives.

/** Shows what belongs to the run as a whole. */
function showRun() {
  $("title").textContent = RUN.title;
  const shown = PROMPTS.length === RUN.of ? `${RUN.of}` : `${PROMPTS.length} of ${RUN.of}`;
  $("subtitle").textContent = `${RUN.store} · ${shown} prompt${RUN.of === 1 ? "" : "s"}`;
  $("prompt-count").textContent = `Prompts (${PROMPTS.length})`;
  $("unfinished").hidden = RUN.complete;
  $("unfinished").textContent =
    "This run has not ended: the page shows what was finished when it was written.";
  $("run-facts").replaceChildren(
    ...RUN.facts.flatMap(({ name, value }) => [
      element("dt", {}, name),
      element("dd", {}, element("bdi", {}, value)),
    ]),
  );
}

/** Makes one row of the list of prompts. */
function promptRow(index) {
  const prompt = PROMPTS[index];
  const chosen = index === STATE.prompt;
  return element(
    "div",
    {
      class: "row prompt",
      role: "option",
      id: `prompt-${index}`,
      "aria-selected": chosen,
      onclick: () => choose({ prompt: index }),
    },
    element("span", { class: "number" }, `${prompt.number}`),
    element("bdi", { class: "text" }, prompt.text),
  );
}

/** Shows the prompt, its positions, what the model predicts and how exact the system is. */
function showHeading(prediction) {
  const prompt = PROMPTS[STATE.prompt];
  const facts = [
    `Prompt ${prompt.number} of ${RUN.of}`,
    `${prediction.tokens} token${prediction.tokens === 1 ? "" : "s"}`,
    `k = ${prediction.k}`,
    prediction.method,
  ];
  if (prediction.seconds !== null) facts.push(duration(prediction.seconds));
  if (prompt.id !== `${prompt.number - 1}`) facts.splice(1, 0, `id ${prompt.id}`);
  $("prompt-facts").replaceChildren(
    ...facts.flatMap((fact) => [element("bdi", {}, fact), " · "]).slice(0, -1),
  );
  $("prompt-text").textContent = prediction.text;
  showPositions(prompt);
  showPredicted(prediction);
  showCertificate(prediction);
  $("method-reason").textContent = prediction.reason;
}

/** Offers the other output positions of a prompt. */
function showPositions(prompt) {
  const place = $("positions");
  place.hidden = prompt.positions.length < 2;
  if (place.hidden) return place.replaceChildren();
  place.replaceChildren(
    ...prompt.positions.map((position, index) =>
      element(
        "button",
        {
          type: "button",
          role: "tab",
          "aria-selected": index === STATE.position,
          onclick: () => choose({ position: index }),
        },
        `${position} → `,
        word(prompt.predicted[index]),
      ),
    ),
  );
}

/** Shows the most probable next tokens. */
function showPredicted(prediction) {
  $("predicted").replaceChildren(
    ...prediction.predicted.map(({ word: text, probability, logit }, rank) =>
      element(
        "div",
        { role: "listitem", class: rank ? "candidate" : "candidate first", title: `logit ${figure(logit)}` },
        element("span", { class: "what" }, rank ? "" : "→ ", word(text)),
        element("span", { class: "meter", "--part": `${100 * probability}%` }),
        element("span", { class: "much" }, percent(probability)),
      ),
    ),
  );
}

/** Shows the certificate: a verdict in colour and words, and each figure beside its bound. */
function showCertificate(prediction) {
  const { certificate, logit } = prediction;
  const place = $("certificate");
  if (!certificate) {
    place.replaceChildren(element("p", { class: "verdict unsure" }, "◌ not finished: no certificate yet"));
    return;
  }
  const missed = certificate.failures.join(", ");
  const verdict = certificate.exact
    ? element("summary", { class: "verdict good" }, "✓ exact within every bound")
    : element("summary", { class: "verdict bad" }, `✗ not exact: ${missed || "figures are missing"}`);
  verdict.append(element("span", { class: "quiet" }, ` (${certificate.dtype})`));
  const rows = certificate.rows.map((row) =>
    element(
      "tr",
      { class: row.meets ? "" : "bad" },
      element("td", {}, row.meets ? "✓" : "✗"),
      element("td", {}, row.name),
      element("td", { class: "n" }, row.value === null ? "not measured" : errorFigure(Number(row.value))),
      element("td", { class: "n" }, row.bound === null ? "" : `≤ ${errorFigure(row.bound)}`),
      element("td", { class: "quiet" }, row.meaning),
    ),
  );
  const table = element("div", { class: "wide" }, element("table", {}, element("tbody", {}, ...rows)));
  const lines = [element("details", {}, verdict, table)];
  if (certificate.not_a_chain) {
    lines.push(element("p", { class: "quiet" }, `linearised as a whole: ${certificate.not_a_chain}`));
  }
  if (logit) {
    const constant = logit.constant + logit.bias;
    lines.push(
      element(
        "p",
        { class: "sum" },
        `Attribution sums to the logit within ${errorFigure(logit.error)}: ` +
          `${figure(logit.logit)} = ${figure(logit.tokens)} (tokens) ` +
          `${constant < 0 ? "−" : "+"} ${figure(Math.abs(constant))} (constant and bias).`,
      ),
    );
  }
  const missing = countStatus(prediction, "not converged");
  if (missing) {
    lines.push(
      element("p", { class: "verdict bad" }, `! ${missing} of ${prediction.tokens} tokens did not converge to the tolerance; they are marked with !`),
    );
  }
  const pending = countStatus(prediction, "pending");
  if (pending) lines.push(element("p", { class: "verdict unsure" }, `◌ ${pending} tokens are not computed yet`));
  place.replaceChildren(...lines);
}

/** Counts the tokens of a status. */
function countStatus(prediction, status) {
  const wanted = RUN.statuses.indexOf(status);
  return prediction.get("status").reduce((sum, found) => sum + (found === wanted), 0);
}

/** Says in one line what is known of a token. */
function tokenLine(prediction, i) {
  const share = prediction.get("attribution")[i];
  const parts = [`attribution ${signed(share)}`];
  if (prediction.solved(i)) {
    parts.push(`σ₁ ${figure(prediction.value("S", i, 0))}`);
    parts.push(`stable rank ${figure(prediction.get("stable_rank")[i])}`);
  }
  parts.push(prediction.status(i));
  return parts.join(" · ");
}

/** Gives a token its colour by attribution. */
function tint(made, prediction, i) {
  const share = prediction.get("attribution")[i];
  const part = prediction.largest > 0 && Number.isFinite(share) ? share / prediction.largest : 0;
  made.style.setProperty("--part", `${Math.round(62 * Math.sqrt(Math.abs(part)))}%`);
  made.classList.add(part < 0 ? "lowers" : "raises");
}

/** Makes one token of the strip. */
function tokenElement(prediction, i, relatives) {
  const made = element(
    "span",
    {
      class: "token",
      role: "option",
      id: `token-${i}`,
      "data-token": i,
      "aria-selected": i === STATE.token,
      "aria-label": `${i} ${prediction.token(i)}, ${tokenLine(prediction, i)}`,
      title: `${i}  ${prediction.token(i)}\n${tokenLine(prediction, i)}`,
    },
    word(prediction.token(i)),
  );
  tint(made, prediction, i);
  if (!prediction.solved(i)) made.classList.add("empty");
  if (prediction.status(i) === "not converged") made.append(element("b", { class: "warn" }, "!"));
  if (relatives.has(i)) made.classList.add("relative");
  return made;
}

/** |cosine| from which a token is ringed in the text. */
const ALIKE = 0.5;

/** The tokens that share the selected direction. */
function relatives(prediction) {
  const found = ["u", "v"].flatMap((side) => prediction.near(side, STATE.token, STATE.direction) ?? []);
  return new Set(found.filter(({ cosine }) => Math.abs(cosine) >= ALIKE).map(({ token }) => token));
}

const COLUMNS = [
  ["token", (prediction, i) => i],
  ["attribution", (prediction, i) => prediction.get("attribution")[i]],
  ["σ₁", (prediction, i) => prediction.value("S", i, 0)],
  ["stable rank", (prediction, i) => prediction.get("stable_rank")[i]],
];

/** Makes one row of the table of tokens. */
function tableRow(prediction, i) {
  const words = (side) =>
    element("span", { class: "line" }, ...spaced(prediction.words(side, i, 0).map(({ text }) => word(text))));
  const solved = prediction.solved(i);
  const made = element(
    "div",
    { class: "row", role: "option", id: `row-${i}`, "aria-selected": i === STATE.token, onclick: () => choose({ token: i }) },
    element("span", { class: "name" }, element("span", { class: "number" }, `${i}`), word(prediction.token(i))),
    element("span", { class: "n share" }, signed(prediction.get("attribution")[i])),
    element("span", { class: "n" }, solved ? figure(prediction.value("S", i, 0)) : "–"),
    element("span", { class: "n" }, solved ? figure(prediction.get("stable_rank")[i]) : "–"),
    solved ? words("v") : element("span", { class: "quiet" }, prediction.status(i)),
    solved ? words("u") : element("span"),
  );
  tint(made.querySelector(".share"), prediction, i);
  if (prediction.status(i) === "not converged") {
    made.querySelector(".name").append(element("b", { class: "warn", title: "not converged" }, "!"));
  }
  return made;
}

/** Puts spaces between elements. */
function spaced(elements) {
  return elements.flatMap((made) => [made, " "]).slice(0, -1);
}

/** Shows the selected token: what is known of it, its spectrum and its directions. */
function showToken(prediction) {
  const i = STATE.token;
  $("token-title").replaceChildren(`Token ${i}  `, word(prediction.token(i)));
  const share = prediction.get("attribution")[i];
  const logit = prediction.logit?.logit;
  const parts = [`attribution ${signed(share)}${logit ? ` (${percent(share / logit)} of the logit)` : ""}`];
  if (prediction.solved(i)) {
    const error = prediction.get("stable_rank_error")[i];
    parts.push(`stable rank ${figure(prediction.get("stable_rank")[i])}${error > 0 ? ` ± ${figure(error)}` : ""}`);
    parts.push(`‖Jx‖ ${figure(prediction.get("contribution")[i])}`);
    const steps = prediction.get("iterations")[i];
    if (steps >= 0) parts.push(`${steps} ${prediction.method === "lanczos" ? "steps" : "streams"}`);
  }
  const status = prediction.status(i);
  $("token-facts").replaceChildren(
    `${parts.join(" · ")} · `,
    element("span", { class: status === "not converged" ? "verdict bad" : "quiet" }, status),
  );
  const solved = prediction.solved(i);
  $("token-body").hidden = !solved;
  $("direction").hidden = !solved;
  if (!solved) return;
  drawSpectrum($("spectrum"), prediction, i, STATE.direction, (j) => choose({ direction: j }));
  showDirections(prediction);
  showDirection(prediction);
}

/** Lists the directions of the selected token. */
function showDirections(prediction) {
  const i = STATE.token;
  const list = $("directions");
  const line = (side, name, j) =>
    element(
      "div",
      { class: "line" },
      element("span", { class: "side" }, name),
      ...spaced(prediction.words(side, i, j).map(({ text }) => word(text))),
    );
  const largest = prediction.value("S", i, 0);
  const tolerance = prediction.tol;
  const rows = [...Array(prediction.k).keys()].map((j) => {
    const residual = prediction.value("residual", i, j);
    const missed = tolerance !== null && residual > tolerance * largest && prediction.status(i) === "not converged";
    return element(
      "div",
      {
        class: "option",
        role: "option",
        id: `direction-${j}`,
        "aria-selected": j === STATE.direction,
        onclick: () => choose({ direction: j }),
      },
      element(
        "div",
        { class: "sigma" },
        element("span", { class: "number" }, `${j + 1}`),
        element("span", {}, figure(prediction.value("S", i, j))),
        missed ? element("b", { class: "warn", title: `residual ${errorFigure(residual)}: not converged` }, "!") : "",
        prediction.joined(i, j)
          ? element("span", { class: "quiet", title: "closer to the next than their errors: only the subspace of both is determined" }, "≈")
          : "",
      ),
      element("div", { class: "lines" }, line("v", "reads", j), line("u", "writes", j)),
    );
  });
  list.replaceChildren(...rows);
  mark(list, `direction-${STATE.direction}`);
  revealWithin(list, $(`direction-${STATE.direction}`));
}

/** Scrolls a list, and nothing else, so far that a child is seen. */
function revealWithin(list, child) {
  const top = child.offsetTop - list.offsetTop;
  if (top < list.scrollTop) list.scrollTop = top;
  else if (top + child.offsetHeight > list.scrollTop + list.clientHeight) {
    list.scrollTop = top + child.offsetHeight - list.clientHeight;
  }
}

/** Shows the selected direction: its words with scores, and the tokens that share it. */
function showDirection(prediction) {
  const { token: i, direction: j } = STATE;
  const relative = prediction.value("S", i, j) / prediction.value("S", i, 0);
  const part = relative ** 2 / prediction.get("stable_rank")[i];
  $("direction-title").replaceChildren(`Direction ${j + 1} of `, word(prediction.token(i)));
  $("direction-facts").textContent =
    `σ = ${figure(prediction.value("S", i, j))} ± ${errorFigure(prediction.value("error_bound", i, j))} · ` +
    `residual ${errorFigure(prediction.value("residual", i, j))} · ` +
    `${percent(part)} of ‖J‖²`;
  for (const [side, place] of [["v", "reads"], ["u", "writes"]]) {
    showWords($(place), prediction.words(side, i, j));
    showNear($(`near-${side}`), prediction, side, prediction.near(side, i, j));
  }
}

/** Lists words with their scores as bars. */
function showWords(place, words) {
  const largest = Math.max(...words.map(({ score }) => Math.abs(score)), 1e-30);
  place.replaceChildren(
    ...words.map(({ text, score }) =>
      element(
        "li",
        {},
        word(text),
        element("span", { class: "meter", "--part": `${(100 * Math.abs(score)) / largest}%` }),
        element("span", { class: "n" }, scoreFigure(score)),
      ),
    ),
  );
}

/** Lists the directions of other tokens that are nearest to the selected one. */
function showNear(place, prediction, side, found) {
  if (found === null) {
    const few = `only the first ${prediction.compared} direction(s) of each token are compared.`;
    const none = "directions are not compared.";
    const why = `So many tokens: ${prediction.compared ? few : none}`;
    place.replaceChildren(element("p", { class: "quiet" }, why));
    return;
  }
  if (!found.length) place.replaceChildren(element("p", { class: "quiet" }, "There is no other token."));
  else {
    place.replaceChildren(
      ...found.map(({ token, direction, cosine }) =>
        element(
          "button",
          { type: "button", onclick: () => choose({ token, direction }) },
          element("span", { class: "n cosine" }, cosine.toFixed(3).replace("-", "−")),
          element("span", { class: cosine < 0 ? "meter opposite" : "meter", "--part": `${100 * Math.abs(cosine)}%` }),
          element("span", { class: "name" }, element("span", { class: "number" }, `${token}`), word(prediction.token(token)), element("span", { class: "quiet" }, ` ${direction + 1}`)),
          element("span", { class: "line quiet" }, ...spaced(prediction.words(side, token, direction).slice(0, 6).map(({ text }) => word(text)))),
        ),
      ),
    );
  }
}

/** The layers of one kind of Jacobian, of those that are stored. */
function layersOfKind(prediction, kind) {
  return prediction.layers.filter((layer) => kindOf(layer) === kind);
}

/** What kind of Jacobian a stored layer is. */
function kindOf({ kind, module }) {
  return module ? `${kind} · ${module}` : kind;
}

/** Shows the layers, where they are stored. */
function showLayers(prediction) {
  $("layers").hidden = !prediction.layers.length;
  if (!prediction.layers.length) return;
  const kinds = [...new Set(prediction.layers.map(kindOf))];
  const select = $("layer-kind");
  const kept = kinds.includes(select.value) ? select.value : kinds[0];
  select.replaceChildren(...kinds.map((kind) => element("option", {}, kind)));
  select.value = kept;
  const layers = layersOfKind(prediction, kept);
  const token = STATE.token;
  drawLayerMap($("layer-map"), prediction, layers, $("layer-figure").value, token, (i) => choose({ token: i }));
  $("layer-curves-title").replaceChildren(`Token ${token}  `, word(prediction.token(token)));
  drawLayerCurves($("layer-curves"), layers, token);
  $("layer-words").replaceChildren(...layers.map((layer) => layerRow(layer, token)));
}

/** Makes a line with what a token's leading direction reads and writes at a layer. */
function layerRow(layer, token) {
  const words = (side) => {
    const start = token * layer.k * layer.top;
    const numbers = Array.from(layer.get(`${side}_word`).subarray(start, start + layer.top));
    return spaced(numbers.filter((n) => n).map((n) => word(RUN.vocabulary[n])));
  };
  const status = RUN.statuses[layer.get("status")[token]];
  return element(
    "div",
    { class: "option" },
    element("div", { class: "sigma" }, element("span", { class: "number" }, `${layer.layer}`), figure(layer.get("S")[token * layer.k]), status === "not converged" ? element("b", { class: "warn", title: status }, "!") : ""),
    element(
      "div",
      { class: "lines" },
      element("div", { class: "line" }, element("span", { class: "side" }, "reads"), ...words("v")),
      element("div", { class: "line" }, element("span", { class: "side" }, "writes"), ...words("u")),
    ),
  );
}
