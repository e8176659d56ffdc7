// The data of the page: matrices are inflated when a head is first looked at.
const $ = id => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const layers = data.layers, spaces = data.spaces;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "on") for (const [event, handler] of Object.entries(value)) element.addEventListener(event, handler);
    else if (name in element && name !== "list") element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

function bytesOf(text) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

// Numbers as people read them: three digits, no exponent unless there must be one.
function number(x) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size < 0.0001 || size >= 1e6) return x.toExponential(1).replace("e-", "e−").replace("e+", "e");
  const digits = size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : size >= 0.1 ? 3 : 4;
  return x.toFixed(digits).replace("-", "−");
}

const inflated = new Map();
function inflate(layer) {
  if (!inflated.has(layer)) {
    const packed = bytesOf($("blob" + layer).textContent);
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    inflated.set(layer, new Response(stream).arrayBuffer().then(buffer => unpackLayer(layer, new Uint8Array(buffer))));
  }
  return inflated.get(layer);
}

// Where each part of a layer lies: scales and codes of the strongest keys, of the groups, then the keys' numbers.
function unpackLayer(at, raw) {
  const { rows, groups, top, heads, q, k } = layers[at];
  const count = rows * heads.length, nq = spaces[q].count, nk = spaces[k].count;
  const queryGroup = data.queryGroups[at], keyGroup = data.keyGroups[at];
  const topScale = 0, topCode = 2 * count, scale = topCode + count * top, code = scale + 2 * count;
  const low = code + count * groups, high = low + count * top;
  const scaleAt = (start, i) => {
    const value = raw[start + 2 * i] + 256 * raw[start + 2 * i + 1];
    return value === 65535 ? 0 : 2 ** (-value / 2048);
  };
  const square = new Float32Array(256).map((_, i) => (i / 255) ** 2);
  const rowIndex = (head, query) => head * rows + (queryGroup ? queryGroup[query] : query);
  function row(head, query, out = new Float32Array(nk)) {
    const i = rowIndex(head, query), base = scaleAt(scale, i), peak = scaleAt(topScale, i);
    for (let key = 0; key < nk; key++) out[key] = base * square[raw[code + i * groups + (keyGroup ? keyGroup[key] : key)]];
    for (let t = i * top; t < (i + 1) * top; t++) out[raw[low + t] + 256 * raw[high + t]] = peak * square[raw[topCode + t]];
    return out;
  }
  function column(head, key, out = new Float32Array(nq)) {
    const group = keyGroup ? keyGroup[key] : key, near = key & 255, far = key >> 8;
    for (let query = 0; query < nq; query++) {
      const i = rowIndex(head, query);
      let value = scaleAt(scale, i) * square[raw[code + i * groups + group]];
      for (let t = i * top; t < (i + 1) * top; t++) {
        if (raw[low + t] === near && raw[high + t] === far) { value = scaleAt(topScale, i) * square[raw[topCode + t]]; break; }
      }
      out[query] = value;
    }
    return out;
  }
  function matrix(head) {
    const out = new Float32Array(nq * nk);
    for (let query = 0; query < nq; query++) row(head, query, out.subarray(query * nk, (query + 1) * nk));
    return out;
  }
  return { row, column, matrix, nq, nk };
}

function receivedOf(at, head) {
  const [largest, text] = layers[at].received, n = spaces[layers[at].k].count;
  const codes = bytesOf(text).subarray(head * n, (head + 1) * n);
  return Float32Array.from(codes, c => largest[head] * (c / 255) ** 2);
}

function tokenName(space, token) {
  const { labels, grid, start } = space;
  if (labels) return labels[token];
  const inside = token - start;
  if (grid && inside >= 0 && inside < grid[0] * grid[1]) return `row ${Math.floor(inside / grid[1])}, column ${inside % grid[1]}`;
  return `token ${token}`;
}

// Colours. A map is 256 colours between its stops.
const ramp = stops => {
  const table = new Uint8ClampedArray(768);
  for (let i = 0; i < 256; i++) {
    const x = i / 255 * (stops.length - 1), a = Math.min(Math.floor(x), stops.length - 2), f = x - a;
    for (let c = 0; c < 3; c++) table[3 * i + c] = stops[a][c] + f * (stops[a + 1][c] - stops[a][c]);
  }
  return table;
};
const MEASURE = ramp([[68, 1, 84], [71, 44, 122], [59, 81, 139], [44, 113, 142], [33, 144, 141], [39, 173, 129], [92, 200, 99], [170, 220, 50], [253, 231, 37]]);
const HEAT = ramp([[0, 0, 4], [40, 11, 84], [101, 21, 110], [159, 42, 99], [212, 72, 66], [245, 125, 21], [250, 193, 39], [252, 255, 164]]);
const PAPER = ramp([[255, 255, 253], [255, 232, 205], [253, 193, 135], [244, 139, 78], [215, 86, 43], [154, 42, 32], [80, 12, 28]]);
const dark = () => document.documentElement.dataset.theme === "dark";
const weightColours = () => (dark() ? HEAT : PAPER);
const css = (table, t) => { const i = 3 * Math.round(255 * Math.min(1, Math.max(0, t))); return `rgb(${table[i]},${table[i + 1]},${table[i + 2]})`; };

// From a weight to a place on the colour map: in proportion, or over three decades.
function shade(weight, largest) {
  if (!(largest > 0) || !(weight > 0)) return 0;
  const part = Math.min(1, weight / largest);
  return state.scale === "log" ? Math.max(0, 1 + Math.log10(part) / 3) : part;
}

function paint(canvas, values, columns, rows, largest, table = weightColours()) {
  canvas.width = columns; canvas.height = rows;
  const context = canvas.getContext("2d"), picture = context.createImageData(columns, rows);
  for (let i = 0; i < values.length; i++) {
    const c = 3 * Math.round(255 * shade(values[i], largest));
    picture.data[4 * i] = table[c]; picture.data[4 * i + 1] = table[c + 1]; picture.data[4 * i + 2] = table[c + 2];
    picture.data[4 * i + 3] = 255;
  }
  context.putImageData(picture, 0, 0);
  return canvas;
}

function paintRamp(canvas, table) {
  const context = canvas.getContext("2d");
  for (let x = 0; x < canvas.width; x++) { context.fillStyle = css(table, x / (canvas.width - 1)); context.fillRect(x, 0, 1, canvas.height); }
}

const largestOf = values => { let m = 0; for (const v of values) if (v > m) m = v; return m; };

// What is looked at. Everything on the page follows from it.
const state = { layer: 0, head: 0, token: null, key: null, pinned: null, direction: "out", scale: "linear", measure: 0, show: "colour", tab: "heads" };
