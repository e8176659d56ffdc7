// All heads at once: a row for each layer, a cell for each head.
const cells = new Map();
const most = Math.max(...layers.map(l => l.heads.length));
const cellSize = Math.max(18, Math.min(40, Math.floor(Math.min(430 / most, 560 / layers.length))));

function range(measure) {
  const values = measure.values.flat().filter(v => v !== null);
  return [Math.min(...values), Math.max(...values)];
}

function buildOverview() {
  const grid = $("grid"), columns = [...new Set(layers.flatMap(l => l.heads))].sort((a, b) => a - b);
  grid.style.gridTemplateColumns = `auto repeat(${columns.length}, ${cellSize}px)`;
  grid.append(make("span", { className: "axis", title: "layers down, heads across" }, ""));
  for (const c of columns) grid.append(make("span", { className: "axis" }, String(c)));
  layers.forEach((layer, at) => {
    grid.append(make("span", { className: "axis", title: layer.name }, String(layer.number)));
    for (const c of columns) {
      const head = layer.heads.indexOf(c);
      if (head < 0) { grid.append(make("span", { className: "none" })); continue; }
      const cell = make("button", { className: "cell", type: "button", tabIndex: -1, role: "gridcell" });
      cell.style.width = cell.style.height = cellSize + "px";
      cell.dataset.head = `${layer.number}.${c}`;
      cell.addEventListener("click", () => select(at, head));
      cells.set(`${at}/${head}`, cell); grid.append(cell);
    }
  });
  grid.addEventListener("keydown", event => {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (!move) return;
    event.preventDefault();
    const at = Math.min(layers.length - 1, Math.max(0, state.layer + move[0]));
    const head = Math.min(layers[at].heads.length - 1, Math.max(0, state.head + move[1]));
    select(at, head); cells.get(`${at}/${head}`).focus();
  });
  data.measures.forEach((m, i) => $("measure").append(make("option", { value: i }, m.name)));
  $("measure").addEventListener("change", event => { state.measure = +event.target.value; colourOverview(); });
  for (const button of document.querySelectorAll("[data-show]")) button.addEventListener("click", () => setShow(button.dataset.show));
}

function setShow(what) {
  state.show = what;
  for (const b of document.querySelectorAll("[data-show]")) b.setAttribute("aria-pressed", b.dataset.show === what);
  colourOverview();
}

// One picture holds the small pictures of all heads; each cell shows its part of it.
const atlases = new Map();
function atlas(what) {
  const key = what + dark() + state.scale;
  if (atlases.has(key)) return atlases.get(key);
  const big = document.createElement("canvas"), small = document.createElement("canvas"), table = weightColours();
  big.width = most * cellSize; big.height = layers.length * cellSize;
  const context = big.getContext("2d"); context.imageSmoothingEnabled = false;
  layers.forEach((layer, at) => {
    const [rows, columns, text] = layer.thumb, thumbs = what === "matrix" ? bytesOf(text) : null, space = spaces[layer.k];
    layer.heads.forEach((_, head) => {
      if (thumbs) {
        const codes = thumbs.subarray(head * rows * columns, (head + 1) * rows * columns);
        paint(small, Float32Array.from(codes, c => (c / 255) ** 2), columns, rows, 1, table);
      } else {
        let values = receivedOf(at, head), shape = [values.length, 1];
        if (space.grid) { shape = [space.grid[1], space.grid[0]]; values = values.subarray(space.start, space.start + shape[0] * shape[1]); }
        paint(small, values, ...shape, largestOf(values), table);
      }
      context.drawImage(small, head * cellSize, at * cellSize, cellSize, cellSize);
    });
  });
  atlases.set(key, `url(${big.toDataURL()})`);
  return atlases.get(key);
}

function rankOf(measure, at, head) {
  const mine = measure.values[at][head];
  return 1 + measure.values.flat().filter(v => v !== null && v > mine).length;
}

function colourOverview() {
  const measure = data.measures[state.measure], [low, high] = measure ? range(measure) : [0, 1];
  const image = state.show === "colour" ? "" : atlas(state.show);
  for (const [key, cell] of cells) {
    const [at, head] = key.split("/").map(Number), value = measure ? measure.values[at][head] : null;
    cell.style.backgroundImage = image;
    if (image) cell.style.backgroundPosition = `${-head * cellSize}px ${-at * cellSize}px`;
    cell.style.backgroundColor = value === null ? "var(--line)" : css(MEASURE, high > low ? (value - low) / (high - low) : 0.5);
    const says = measure ? `, ${measure.name} ${number(value)} ${measure.unit}` : "";
    cell.title = `layer ${layers[at].number}, head ${layers[at].heads[head]}${says}`;
    cell.setAttribute("aria-label", cell.title);
  }
  const pictures = state.show !== "colour";
  $("legend-low").textContent = pictures ? (state.scale === "log" ? "a thousandth" : "0") : number(low);
  $("legend-high").textContent = pictures ? "each head's largest" : `${number(high)} ${measure ? measure.unit : ""}`;
  paintRamp($("legend-bar"), pictures ? weightColours() : MEASURE);
  const about = { matrix: "Queries down, keys across, pooled.", map: "How much attention each key receives, mean over queries." }[state.show];
  $("measure-about").textContent = about || (measure ? measure.about : "");
  $("measure").value = state.measure;
}

function markSelected() {
  for (const [key, cell] of cells) {
    const chosen = key === `${state.layer}/${state.head}`;
    cell.setAttribute("aria-selected", chosen); cell.tabIndex = chosen ? 0 : -1;
  }
}
