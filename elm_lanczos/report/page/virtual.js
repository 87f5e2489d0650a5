// Long lists: only the rows in view are in the document.

/** Shows rows of one height inside a scrolling frame. */
class VirtualRows {
  /**
   * @param {HTMLElement} frame the element that scrolls
   * @param {number} height of a row in pixels
   * @param {(row: number) => HTMLElement} render makes one row
   */
  constructor(frame, height, render) {
    this.frame = frame;
    this.height = height;
    this.render = render;
    this.count = 0;
    this.body = element("div", { class: "rows", role: "presentation" });
    frame.replaceChildren(this.body);
    frame.addEventListener("scroll", () => this.draw(), { passive: true });
  }

  /** Shows so many rows. */
  show(count) {
    this.count = count;
    this.body.style.height = this.frame.style.height = `${count * this.height}px`;
    this.refresh();
  }

  /** Draws the rows in view anew. */
  refresh() {
    this.drawn = null;
    this.draw();
  }

  /** Draws the rows in view, if they are not drawn. */
  draw() {
    const first = Math.max(0, Math.floor(this.frame.scrollTop / this.height) - 3);
    const seen = Math.ceil(this.frame.clientHeight / this.height) + 6;
    const last = Math.min(this.count, first + seen);
    if (this.drawn === `${first} ${last}`) return;
    this.drawn = `${first} ${last}`;
    const rows = [];
    for (let row = first; row < last; row++) {
      const made = this.render(row);
      made.style.top = `${row * this.height}px`;
      made.style.height = `${this.height}px`;
      rows.push(made);
    }
    this.body.replaceChildren(...rows);
  }

  /** Scrolls a row into view, to the middle if it was not there. */
  reveal(row) {
    const top = row * this.height;
    const { scrollTop, clientHeight } = this.frame;
    const seen = top >= scrollTop && top + this.height <= scrollTop + clientHeight;
    if (!seen) this.frame.scrollTop = top - (clientHeight - this.height) / 2;
    this.draw();
  }
}

/**
 * Breaks tokens into rows of a width, also behind every newline.
 *
 * @param {Prediction} prediction whose tokens they are
 * @param {number} width of a row in pixels
 * @param {CanvasRenderingContext2D} ruler set to the font of a token
 * @param {number} padding of a token in pixels, both sides with its gap
 * @returns {number[]} the first token of every row
 */
function breakIntoRows(prediction, width, ruler, padding) {
  const widths = new Map();
  const numbers = prediction.get("token");
  const starts = [0];
  let used = 0;
  for (let i = 0; i < prediction.tokens; i++) {
    const text = prediction.token(i);
    if (!widths.has(numbers[i])) widths.set(numbers[i], ruler.measureText(text).width + padding);
    const needed = Math.min(width, widths.get(numbers[i]));
    const broken = i > 0 && prediction.token(i - 1).endsWith("⏎");
    if (i > 0 && (broken || used + needed > width)) {
      starts.push(i);
      used = 0;
    }
    used += needed;
  }
  return starts;
}
