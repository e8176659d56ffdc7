// One head: its tokens on the image or in the text, its matrix, and the same token in every head of the layer.
let panels = [], layerData = null, matrixValues = null, matrixCanvas = document.createElement("canvas"), drawing = 0;

// How wide a picture may be: two stand side by side where there is room.
function side() {
  const width = $("stage").clientWidth || 800, found = Math.floor(Math.min(440, width > 560 ? (width - 24) / 2 : width - 4));
  $("stage").style.setProperty("--side", found + "px");
  return found;
}

// Tokens of one space, shown as an image with patches, as text, or as both.
class Panel {
  constructor(space, title) {
    this.space = space; this.spans = new Map();
    const { grid, start, count } = space, patches = grid ? grid[0] * grid[1] : 0;
    this.element = make("figure", { className: "panel" });
    if (title) this.element.append(make("figcaption", { className: "soft small" }, title));
    if (grid) {
      this.canvas = make("canvas", { className: "patches" });
      const big = Math.max(grid[0], grid[1]);
      this.scale = side() / big;
      this.canvas.width = Math.round(grid[1] * this.scale); this.canvas.height = Math.round(grid[0] * this.scale);
      this.canvas.addEventListener("mousemove", e => hover(this, this.patchAt(e)));
      this.canvas.addEventListener("mouseleave", () => hover(this, null));
      this.canvas.addEventListener("click", e => pin(this, this.patchAt(e)));
      this.element.append(make("div", { className: "frame" }, this.canvas));
      if (space.image !== null) { this.image = new Image(); this.image.addEventListener("load", () => refresh()); this.image.src = data.images[space.image]; }
    }
    this.flow = make("div", { className: patches ? "singles" : "flow" });
    for (let token = 0; token < count; token++) {
      if (token === start && patches) { token += patches - 1; if (count - patches > 16) this.flow.append(make("span", { className: "soft" }, ` ▦ ${grid[0]}×${grid[1]} patches `)); continue; }
      const label = tokenName(space, token), shown = space.labels ? label.replace(/\n/g, "⏎\n") : label;
      const span = make("span", { className: "token" }, shown || "∅");
      if (!space.labels && !patches) span.textContent = String(token);
      span.dataset.token = token; this.spans.set(token, span); this.flow.append(span);
      if (!space.labels) this.flow.append(" ");
    }
    const tokenOf = e => { const span = e.target.closest(".token"); return span ? +span.dataset.token : null; };
    this.flow.addEventListener("mouseover", e => hover(this, tokenOf(e)));
    this.flow.addEventListener("mouseleave", () => hover(this, null));
    this.flow.addEventListener("click", e => pin(this, tokenOf(e)));
    if (this.spans.size) this.element.append(this.flow);
  }

  patchAt(event) {
    const box = this.canvas.getBoundingClientRect(), { grid, start } = this.space;
    const column = Math.floor((event.clientX - box.left) / box.width * grid[1]), row = Math.floor((event.clientY - box.top) / box.height * grid[0]);
    return row >= 0 && row < grid[0] && column >= 0 && column < grid[1] ? start + row * grid[1] + column : null;
  }

  // values: what each token is coloured by, or null; current: the token that is looked from.
  show(values, largest, current) {
    const table = weightColours();
    if (this.canvas) {
      const { grid, start } = this.space, context = this.canvas.getContext("2d"), { width, height } = this.canvas;
      context.clearRect(0, 0, width, height);
      if (this.image && this.image.complete) {
        context.filter = values ? "grayscale(0.65) brightness(0.75)" : "none";
        context.drawImage(this.image, 0, 0, width, height);
        context.filter = "none";
      }
      if (values) {
        const small = document.createElement("canvas"); small.width = grid[1]; small.height = grid[0];
        const part = small.getContext("2d"), picture = part.createImageData(grid[1], grid[0]), heat = this.image ? HEAT : table;
        for (let i = 0; i < grid[0] * grid[1]; i++) {
          const t = shade(values[start + i], largest), c = 3 * Math.round(255 * (this.image ? 0.35 + 0.65 * t : t));
          picture.data.set([heat[c], heat[c + 1], heat[c + 2], this.image ? 255 * Math.min(0.9, 1.6 * t) : 255], 4 * i);
        }
        part.putImageData(picture, 0, 0);
        context.imageSmoothingEnabled = false;
        context.drawImage(small, 0, 0, width, height);
      }
      const inside = current === null ? -1 : current - start;
      if (inside >= 0 && inside < grid[0] * grid[1]) {
        const x = inside % grid[1] * this.scale, y = Math.floor(inside / grid[1]) * this.scale;
        for (const [colour, line] of [["#000", 4], ["#fff", 2]]) { context.strokeStyle = colour; context.lineWidth = line; context.strokeRect(x + 1, y + 1, this.scale - 2, this.scale - 2); }
      }
    }
    for (const [token, span] of this.spans) {
      const t = values ? shade(values[token], largest) : 0;
      span.style.backgroundColor = t > 0.004 ? `rgba(var(--hot), ${(0.9 * t).toFixed(3)})` : "";
      span.classList.toggle("current", token === current);
      span.title = values ? `${tokenName(this.space, token).trim()}: ${number(values[token])}` : "";
    }
  }
}

async function select(at, head, quiet = false) {
  const moved = at !== state.layer || !panels.length, other = !panels.length || layers[at].q !== layers[state.layer].q || layers[at].k !== layers[state.layer].k;
  state.layer = at; state.head = head;
  markSelected();
  if (!quiet) history.replaceState(null, "", `#L${layers[at].number}H${layers[at].heads[head]}`);
  if (other) { state.token = state.pinned = state.key = null; }
  const mine = ++drawing, found = await inflate(at);
  if (mine !== drawing) return;  // another head was asked for meanwhile
  layerData = found;
  if (other) buildPanels();
  if (moved || !$("strip").children.length) buildStrip();
  matrixValues = layerData.matrix(head);
  drawMatrix();
  const layer = layers[at];
  $("head-title").textContent = `Layer ${layer.number} · head ${layer.heads[head]}`;
  $("head-title").title = layer.name;
  const chips = data.measures.map(m => make("span", { className: "chip", title: `${m.about} #: its rank among all heads, from the largest.` }, `${m.name} `, make("b", {}, number(m.values[at][head])), ` ${m.unit} · #${rankOf(m, at, head)}`));
  const pattern = patternOf(at, head);
  if (pattern) chips.push(make("span", { className: "chip" }, "pattern ", make("b", {}, pattern)));
  $("chips").replaceChildren(make("span", { className: "chip" }, layer.name), ...chips);
  if (layer.note) $("chips").append(make("span", { className: "chip soft" }, layer.note));
  refresh();
  document.documentElement.dataset.shown = `${layer.number}.${layer.heads[head]}`;
}

function buildPanels() {
  const { q, k } = layers[state.layer];
  panels = q === k ? [new Panel(spaces[q])] : [new Panel(spaces[q], "queries"), new Panel(spaces[k], "keys")];
  $("panels").replaceChildren(...panels.map(p => p.element));
}

// Which token is looked from, and whether it is a query or a key.
function hover(panel, token) {
  if (state.pinned !== null) return;
  if (panels.length === 2 && token !== null) setDirection(panel === panels[0] ? "out" : "in", false);
  if (token !== state.token || state.key !== null) { state.token = token; state.key = null; schedule(); }
}
function pin(panel, token) {
  state.pinned = state.pinned === token ? null : token;
  if (panels.length === 2 && token !== null) setDirection(panel === panels[0] ? "out" : "in", false);
  state.token = token; state.key = null; schedule();
}
function setDirection(direction, redraw = true) {
  state.direction = direction;
  for (const b of document.querySelectorAll("[data-direction]")) b.setAttribute("aria-pressed", b.dataset.direction === direction);
  const length = direction === "out" ? layerData.nq : layerData.nk;
  if (redraw && state.token !== null && state.token >= length) state.token = state.pinned = null;
  if (redraw) refresh();
}
function setScale(scale) {
  state.scale = scale;
  for (const b of document.querySelectorAll("[data-scale]")) b.setAttribute("aria-pressed", b.dataset.scale === scale);
  drawMatrix(); colourOverview(); refresh();
}

let scheduled = false;
function schedule() { if (!scheduled) { scheduled = true; requestAnimationFrame(() => { scheduled = false; refresh(); }); } }

function refresh() {
  if (!layerData || !panels.length) return;
  const { token, direction, head } = state, source = panels[direction === "in" && panels[1] ? 1 : 0], target = panels.length === 2 && direction === "out" ? panels[1] : panels[0];
  const values = token === null ? receivedOf(state.layer, head) : direction === "out" ? layerData.row(head, token) : layerData.column(head, token);
  const aim = token === null ? panels[panels.length - 1] : target, largest = largestOf(values);
  for (const panel of panels) panel.show(panel === aim ? values : null, largest, panel === source ? token : null);
  $("weight-high").textContent = `${number(largest)} of ${token === null ? "a mean query" : "the query"}'s attention`;
  $("weight-low").textContent = state.scale === "log" ? `${number(largest / 1000)} and less` : "0";
  paintRamp($("weight-bar"), aim.image ? HEAT : weightColours());
  readOut(values, aim.space, source.space);
  paintStrip();
  markMatrix();
}

// A token's name, with its place if it is a word of a text.
function said(space, token) {
  const { grid, start, labels } = space, inside = token - start, name = tokenName(space, token).trim() || "␣";
  const patch = grid && inside >= 0 && inside < grid[0] * grid[1];
  return labels && !patch ? `${name} · ${token}` : name;
}

function readOut(values, target, source) {
  const { token, direction, key } = state;
  let total = 0; for (const v of values) total += v;
  const order = Array.from(values.keys()).sort((a, b) => values[b] - values[a]).slice(0, 5), largest = values[order[0]] || 1;
  const name = token === null ? "" : said(source, token);
  const line = token === null ? "All queries together: which keys receive most"
    : direction === "out" ? `“${name}” looks at` : `“${name}” is looked at by (it receives ${number(total / values.length)} of the mean query)`;
  const extra = key === null || token === null ? "" : `; at “${said(target, key)}” with ${number(values[key])}`;
  $("readout").replaceChildren(make("p", {}, make("b", {}, line), extra, state.pinned === null ? "" : make("span", { className: "soft" }, " · pinned, Esc lets go")),
    ...order.filter(i => values[i] > 0).map(i => {
      const bar = make("i"); bar.style.width = 100 * values[i] / largest + "%";
      return make("div", { className: "bar" }, make("span", {}, said(target, i)), make("span", {}, number(values[i])), bar);
    }));
}

// The matrix, a pixel for each weight (or, of very long texts, for a few).
let matrixTop = 1;
function drawMatrix() {
  const sample = Float32Array.from({ length: 4096 }, (_, i) => matrixValues[Math.floor(i * matrixValues.length / 4096)]).sort();
  matrixTop = Math.max(sample[Math.floor(0.99 * sample.length)], largestOf(matrixValues) / 20);
  paint(matrixCanvas, matrixValues, layerData.nk, layerData.nq, matrixTop);
  const canvas = $("matrix"), fit = side() / Math.max(layerData.nk, layerData.nq);
  canvas.width = Math.max(8, Math.round(layerData.nk * fit)); canvas.height = Math.max(8, Math.round(layerData.nq * fit));
  $("matrix-about").textContent = `${layerData.nq} queries down, ${layerData.nk} keys across; the end of the scale is ${number(matrixTop)} and more`;
}
function markMatrix() {
  const canvas = $("matrix"), context = canvas.getContext("2d"), { width, height } = canvas;
  context.imageSmoothingEnabled = layerData.nk > width;
  context.drawImage(matrixCanvas, 0, 0, width, height);
  if (state.token === null) return;
  context.strokeStyle = getComputedStyle(document.documentElement).getPropertyValue("--accent"); context.lineWidth = 1.5;
  const out = state.direction === "out", size = out ? height / layerData.nq : width / layerData.nk, at = state.token * size;
  if (out) context.strokeRect(0, at - 0.5, width, size + 1); else context.strokeRect(at - 0.5, 0, size + 1, height);
}
function matrixMove(event, pinning) {
  const box = $("matrix").getBoundingClientRect();
  const query = Math.floor((event.clientY - box.top) / box.height * layerData.nq), key = Math.floor((event.clientX - box.left) / box.width * layerData.nk);
  if (query < 0 || key < 0 || query >= layerData.nq || key >= layerData.nk) return;
  const token = state.direction === "out" ? query : key;
  if (pinning) state.pinned = state.pinned === token ? null : token;
  else if (state.pinned !== null) return;
  state.token = token; state.key = state.direction === "out" ? key : query; schedule();
}

// The chosen token in every head of the layer.
function buildStrip() {
  const layer = layers[state.layer];
  const { grid, count } = spaces[layer.k], mixed = grid && count > grid[0] * grid[1] + 16;
  $("strip-title").textContent = `All heads of layer ${layer.number}${mixed ? ", on the image" : ""}`;
  $("strip").replaceChildren(...layer.heads.map((name, head) => make("button", { type: "button", title: `head ${name}`, on: { click: () => select(state.layer, head) } }, make("canvas"), make("span", {}, String(name)))));
}
function paintStrip() {
  const layer = layers[state.layer], out = state.direction === "out", space = spaces[state.token === null || out ? layer.k : layer.q];
  [...$("strip").children].forEach((button, head) => {
    button.setAttribute("aria-current", head === state.head);
    let values = state.token === null ? receivedOf(state.layer, head) : out ? layerData.row(head, state.token) : layerData.column(head, state.token);
    const canvas = button.firstChild, largest = largestOf(values);
    if (space.grid) { paint(canvas, values.subarray(space.start, space.start + space.grid[0] * space.grid[1]), space.grid[1], space.grid[0], largest); canvas.style.width = canvas.style.height = "72px"; canvas.style.aspectRatio = "auto"; if (space.grid[0] !== space.grid[1]) canvas.style.height = 72 * space.grid[0] / space.grid[1] + "px"; }
    else { paint(canvas, values, values.length, 1, largest); canvas.style.width = "132px"; canvas.style.height = "20px"; }
  });
}

function bindStage() {
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width && layerData) { width = innerWidth; buildPanels(); drawMatrix(); refresh(); } });
  $("matrix").addEventListener("mousemove", e => matrixMove(e, false));
  $("matrix").addEventListener("mouseleave", () => { if (state.pinned === null) { state.token = state.key = null; schedule(); } });
  $("matrix").addEventListener("click", e => matrixMove(e, true));
  for (const b of document.querySelectorAll("[data-direction]")) b.addEventListener("click", () => setDirection(b.dataset.direction));
  for (const b of document.querySelectorAll("[data-scale]")) b.addEventListener("click", () => setScale(b.dataset.scale));
  $("stage").addEventListener("keydown", event => {
    const { grid, start } = spaces[layers[state.layer][state.direction === "out" ? "q" : "k"]], count = state.direction === "out" ? layerData.nq : layerData.nk;
    const inside = grid && state.token !== null && state.token >= start && state.token < start + grid[0] * grid[1];
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: inside ? -grid[1] : -1, ArrowDown: inside ? grid[1] : 1 }[event.key];
    if (step) {
      event.preventDefault();
      const next = state.token === null ? 0 : state.token + step;
      state.token = Math.min(count - 1, Math.max(0, next)); state.key = null;
      if (state.pinned !== null) state.pinned = state.token;
      schedule();
    } else if (event.key === "Enter" && state.token !== null) { state.pinned = state.pinned === null ? state.token : null; schedule(); }
  });
}
