// Charts, drawn by plotly.js in the page's own colours.

/** Keeps plotly from taking anything in a text for markup. */
function plain(text) {
  return text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

/** A colour of the style sheet, by the name of its variable. */
function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** The part of a layout that all charts have. */
function layoutOf(height, more) {
  const axis = {
    gridcolor: colour("line"),
    linecolor: colour("line"),
    zeroline: false,
    automargin: true,
    tickfont: { size: 11 },
    title: { font: { size: 12 } },
  };
  const layout = {
    height,
    margin: { l: 56, r: 12, t: 10, b: 40 },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: colour("sans"), size: 12, color: colour("text") },
    hoverlabel: {
      bgcolor: colour("surface"),
      bordercolor: colour("line"),
      font: { color: colour("text"), family: colour("sans") },
      align: "left",
    },
    showlegend: false,
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    ...more,
  };
  for (const name of Object.keys(layout)) {
    if (/^[xy]axis\d*$/.test(name)) layout[name] = { ...axis, ...layout[name] };
  }
  return layout;
}

const CHART = {
  displaylogo: false,
  responsive: true,
  modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
  toImageButtonOptions: { format: "svg" },
};

/** Draws a chart and calls back with the point that is clicked. */
function drawChart(place, traces, layout, clicked) {
  const drawn = Plotly.react(place, traces, layout, CHART);
  place.removeAllListeners?.("plotly_click");
  place.on("plotly_click", (event) => clicked(event.points[0]));
  return drawn;
}

/** Median over the solved tokens of every singular value, and its quartiles. */
function typicalSpectrum(prediction) {
  if (prediction.typical) return prediction.typical;
  const solved = [...Array(prediction.tokens).keys()].filter((i) => prediction.solved(i));
  const quantiles = { low: [], middle: [], high: [] };
  for (let j = 0; j < prediction.k; j++) {
    const values = Float32Array.from(solved, (i) => prediction.value("S", i, j)).sort();
    const at = (part) => values[Math.round(part * (values.length - 1))];
    quantiles.low.push(at(0.25));
    quantiles.middle.push(at(0.5));
    quantiles.high.push(at(0.75));
  }
  return (prediction.typical = quantiles);
}

/** A line of words for a hover text. */
function wordLine(prediction, side, i, j) {
  const words = prediction.words(side, i, j).slice(0, 6);
  return plain(words.map(({ text }) => text.replace(/^␣/, "")).join("  "));
}

/** Draws the singular values of a token, over those of all tokens. */
function drawSpectrum(place, prediction, i, direction, choose) {
  const x = [...Array(prediction.k).keys()];
  const values = x.map((j) => prediction.value("S", i, j));
  const typical = typicalSpectrum(prediction);
  const band = { mode: "lines", line: { width: 0 }, hoverinfo: "skip" };
  const traces = [
    { ...band, x, y: typical.low },
    { ...band, x, y: typical.high, fill: "tonexty", fillcolor: colour("band") },
    {
      x,
      y: typical.middle,
      mode: "lines",
      line: { color: colour("quiet"), width: 1, dash: "dot" },
      hovertemplate: "median of all tokens %{y:.4g}<extra></extra>",
    },
    {
      x,
      y: values,
      mode: "lines+markers",
      line: { color: colour("accent"), width: 1.5 },
      marker: {
        size: x.map((j) => (j === direction ? 11 : 7)),
        color: x.map((j) => colour(j === direction ? "chosen" : "accent")),
      },
      error_y: {
        type: "data",
        array: x.map((j) => prediction.value("error_bound", i, j)),
        thickness: 1,
        width: 2,
      },
      text: x.map(
        (j) =>
          `reads: ${wordLine(prediction, "v", i, j)}<br>writes: ${wordLine(prediction, "u", i, j)}`,
      ),
      customdata: x.map((j) => j + 1),
      hovertemplate: "σ<sub>%{customdata}</sub> = %{y:.4g}<br>%{text}<extra></extra>",
    },
  ];
  const step = Math.ceil(prediction.k / 12);
  const ticks = x.filter((j) => j % step === 0);
  const layout = layoutOf(300, {
    xaxis: {
      title: { text: "direction" },
      tickvals: ticks,
      ticktext: ticks.map((j) => `${j + 1}`),
      range: [-0.5, prediction.k - 0.5],
      showgrid: false,
    },
    yaxis: { title: { text: "σ" }, ...sizeAxis([...values, ...typical.low, ...typical.high]) },
  });
  drawChart(place, traces, layout, (point) => choose(point.pointNumber));
}

/** An axis of sizes: logarithmic where all are positive, with ticks that are read within a decade. */
function sizeAxis(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  if (!(low > 0) || !Number.isFinite(high)) return { type: "linear", rangemode: "tozero" };
  const steps = high / low > 1e4 ? [1] : high / low > 30 ? [1, 3] : [1, 2, 3, 5, 7];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
    for (const step of steps) {
      const tick = step * 10 ** power;
      if (tick >= low / 1.3 && tick <= high * 1.3) ticks.push(tick);
    }
  }
  return { type: "log", tickvals: ticks, ticktext: ticks.map(figure) };
}

/** Draws attribution, σ₁ and stable rank along the tokens. */
function drawOverview(place, prediction, token, choose) {
  const count = prediction.tokens;
  const x = [...Array(count).keys()];
  const names = x.map((i) => `${i} ${plain(prediction.token(i))}`);
  const few = count <= 120;
  const leading = Float32Array.from(x, (i) => prediction.value("S", i, 0));
  const rows = [
    ["attribution", prediction.get("attribution"), "accent"],
    ["σ₁", leading, "second"],
    ["stable rank", prediction.get("stable_rank"), "third"],
  ];
  const traces = rows.map(([name, values, tone], row) => ({
    x,
    y: Array.from(values),
    yaxis: `y${row + 1}`,
    mode: few ? "lines+markers" : "lines",
    line: { color: colour(tone), width: few ? 1.2 : 0.8 },
    marker: { size: 4 },
    opacity: count > SMOOTHED ? 0.45 : 1,
    text: names,
    hovertemplate: `%{text}<br>${name} %{y:.4g}<extra></extra>`,
  }));
  if (few) {
    const shades = traces[0].y.map((share) => colour(share < 0 ? "negative" : "accent"));
    Object.assign(traces[0], { type: "bar", textposition: "none", marker: { color: shades } });
  }
  if (count > SMOOTHED) {
    for (const [row, [name, values, tone]] of rows.entries()) {
      traces.push(runningMedian(values, name, { yaxis: `y${row + 1}`, line: { color: colour(tone), width: 2 } }));
    }
  }
  const missed = x.filter((i) => prediction.status(i) === "not converged");
  traces.push({
    x: missed,
    y: missed.map((i) => leading[i]),
    yaxis: "y2",
    mode: "markers",
    marker: { symbol: "x", size: 7, color: colour("bad") },
    text: missed.map((i) => names[i]),
    hovertemplate: "%{text}<br>not converged<extra></extra>",
  });
  const labelled = count <= 36;
  const layout = layoutOf(420, {
    xaxis: {
      anchor: "y3",
      range: [-0.6, count - 0.4],
      showgrid: false,
      ...(labelled ? { tickvals: x, ticktext: x.map((i) => plain(shortened(prediction.token(i)))) } : {}),
    },
    yaxis: { domain: [0.7, 1], title: { text: "attribution" }, zeroline: true, zerolinecolor: colour("quiet") },
    yaxis2: { domain: [0.36, 0.64], title: { text: "σ₁" }, rangemode: "tozero" },
    yaxis3: { domain: [0, 0.3], title: { text: "stable rank" }, rangemode: "tozero" },
    shapes: [selectionLine(token)],
    hovermode: "closest",
    hoverdistance: 40,
  });
  return drawChart(place, traces, layout, (point) => choose(point.x));
}

/** Tokens beyond which a running median is drawn over the curves. */
const SMOOTHED = 1000;

/** The median of a curve within windows that slide along it. */
function runningMedian(values, name, more) {
  const windows = 160;
  const width = Math.ceil(values.length / windows) * 2;
  const x = [...Array(windows).keys()].map((n) => Math.round(((n + 0.5) * values.length) / windows));
  const y = x.map((middle) => {
    const start = Math.max(0, middle - width / 2);
    const sorted = Float32Array.from(values.slice(start, start + width)).filter(Number.isFinite).sort();
    return sorted[sorted.length >> 1];
  });
  const hovertemplate = `median of ${width} tokens around %{x}<br>${name} %{y:.4g}<extra></extra>`;
  return { x, y, mode: "lines", hovertemplate, ...more };
}

/** A text that fits below an axis. */
function shortened(text) {
  const characters = [...text];
  return characters.length > 14 ? `${characters.slice(0, 13).join("")}…` : text;
}

/** The line through all three charts at the selected token. */
function selectionLine(token) {
  const line = { color: colour("chosen"), width: 1.5 };
  return { type: "line", x0: token, x1: token, y0: 0, y1: 1, yref: "paper", line };
}

/** Draws one figure of all tokens and layers as a map. */
function drawLayerMap(place, prediction, layers, name, token, choose) {
  const count = prediction.tokens;
  const rows = layers.map((layer) =>
    Array.from({ length: count }, (_, i) => {
      const value = layer.get(name)[name === "S" ? i * layer.k : i];
      return Number.isFinite(value) ? value : null;
    }),
  );
  const x = [...Array(count).keys()];
  const traces = [
    {
      type: "heatmap",
      x,
      y: layers.map((layer) => layer.layer),
      z: rows,
      text: rows.map(() => x.map((i) => `${i} ${plain(prediction.token(i))}`)),
      colorscale: "Cividis",
      colorbar: { thickness: 10, outlinewidth: 0 },
      hovertemplate: "%{text}<br>layer %{y}<br>%{z:.4g}<extra></extra>",
    },
  ];
  const layout = layoutOf(320, {
    xaxis: {
      showgrid: false,
      ...(count <= 24 ? { tickvals: x, ticktext: x.map((i) => plain(shortened(prediction.token(i)))) } : {}),
    },
    yaxis: { title: { text: "layer" }, showgrid: false },
    shapes: [selectionLine(token)],
  });
  drawChart(place, traces, layout, (point) => choose(point.x));
}

/** Draws σ₁ and stable rank of a token through the layers. */
function drawLayerCurves(place, layers, token) {
  const x = layers.map((layer) => layer.layer);
  const trace = (y, yaxis, tone, name) => ({
    x,
    y,
    yaxis,
    mode: "lines+markers",
    line: { color: colour(tone), width: 1.5 },
    hovertemplate: `layer %{x}<br>${name} %{y:.4g}<extra></extra>`,
  });
  const leading = layers.map((layer) => layer.get("S")[token * layer.k]);
  const ranks = layers.map((layer) => layer.get("stable_rank")[token]);
  const layout = layoutOf(320, {
    xaxis: { anchor: "y2", title: { text: "layer" }, showgrid: false },
    yaxis: { domain: [0.55, 1], title: { text: "σ₁" }, ...sizeAxis(leading) },
    yaxis2: { domain: [0, 0.45], title: { text: "stable rank" }, rangemode: "tozero" },
  });
  const traces = [trace(leading, "y", "second", "σ₁"), trace(ranks, "y2", "third", "stable rank")];
  drawChart(place, traces, layout, () => {});
}
