// Elements and numbers. Every text of the run reaches the page as a text node, never as markup.

const $ = (id) => document.getElementById(id);

/** Makes an element; `attributes` may hold class, handlers (onclick) and any attribute. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) made.style.setProperty(name, value);
    else if (value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** Shows a token or a word, apart from the direction of the text around it. */
function word(text) {
  const shown = element("bdi", { class: "word" });
  if (text.startsWith("␣")) shown.append(element("span", { class: "space" }, "␣"), text.slice(1));
  else shown.append(text);
  return shown;
}

/** A number with four digits. */
function figure(value) {
  if (!Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e5 || size < 1e-3) return value.toExponential(2).replace("-", "−").replace("+", "");
  return String(Number(value.toPrecision(4))).replace("-", "−");
}

/** A score, as all of its list: with three decimals unless it is large. */
function scoreFigure(value) {
  return Math.abs(value) < 100 ? value.toFixed(3).replace("-", "−") : figure(value);
}

/** A number with its sign. */
function signed(value) {
  return value > 0 ? `+${figure(value)}` : figure(value);
}

/** A part of a whole in per cent. */
function percent(part) {
  return Number.isFinite(part) ? `${(100 * part).toFixed(1).replace("-", "−")} %` : "–";
}

/** An error, with one digit. */
function errorFigure(value) {
  if (value === 0) return "0";
  if (!Number.isFinite(value)) return "not finite";
  return value.toExponential(1).replace("-", "−").replace("+", "");
}

/** A time in words. */
function duration(seconds) {
  if (seconds < 90) return `${Number(seconds.toPrecision(2))} s`;
  return seconds < 5400 ? `${(seconds / 60).toFixed(1)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

/** Selects the option of a listbox that is drawn as `id`. */
function mark(list, id) {
  if (id) list.setAttribute("aria-activedescendant", id);
  else list.removeAttribute("aria-activedescendant");
}
