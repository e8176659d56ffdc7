// Charts as SVG: lines with bands, and dots that can be clicked.
const SVG = "http://www.w3.org/2000/svg";
function draw(tag, attributes, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// A number on an axis, without zeros that say nothing.
const tick = t => number(t).replace(/(\.\d*?)0+(?=$|e)/, "$1").replace(/\.(?=$|e)/, "");

function ticksOf(low, high, integers) {
  const rough = (high - low) / 5 || 1, unit = 10 ** Math.floor(Math.log10(rough));
  let step = [1, 2, 2.5, 5, 10].map(m => m * unit).find(s => s >= rough * 0.999);
  if (integers) step = Math.max(1, Math.round(step));
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step);
  return found;
}

// series: {name, colour, points: [[x, y]], band: [[x, low, high]]}; dots: {x, y, colour, title, click, over}
function chart({ series = [], dots = [], xLabel, yLabel, width = 520, height = 300, fromZero = false, integers = false, label }) {
  const xs = [], ys = [];
  for (const s of series) { for (const [x, y] of s.points) { xs.push(x); ys.push(y); } for (const [, a, b] of s.band || []) ys.push(a, b); }
  for (const d of dots) { xs.push(d.x); ys.push(d.y); }
  let [x0, x1, y0, y1] = [Math.min(...xs), Math.max(...xs), fromZero ? Math.min(0, ...ys) : Math.min(...ys), Math.max(...ys)];
  const padX = (x1 - x0 || 1) * 0.03, padY = (y1 - y0 || Math.abs(y1) || 1) * 0.05;
  x0 -= padX; x1 += padX; y1 += padY; if (!fromZero) y0 -= padY;
  const left = 58, right = 12, top = 10, bottom = 42;
  const px = x => left + (x - x0) / (x1 - x0) * (width - left - right), py = y => height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label || `${yLabel} over ${xLabel}` });
  for (const t of ticksOf(y0, y1)) {
    svg.append(draw("line", { class: "rule", x1: left, x2: width - right, y1: py(t), y2: py(t) }), draw("text", { class: "tick", x: left - 6, y: py(t) + 4, "text-anchor": "end" }, tick(t)));
  }
  for (const t of ticksOf(x0, x1, integers)) svg.append(draw("text", { class: "tick", x: px(t), y: height - bottom + 16, "text-anchor": "middle" }, integers ? t : tick(t)));
  svg.append(draw("text", { class: "axis", x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, xLabel));
  svg.append(draw("text", { class: "axis", "text-anchor": "middle", transform: `translate(13 ${(top + height - bottom) / 2}) rotate(-90)` }, yLabel));
  const path = points => points.map(([x, y]) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`).join(" ");
  for (const s of series) {
    if (s.band) svg.append(draw("polygon", { class: "band", fill: s.colour, points: path([...s.band.map(([x, a]) => [x, a]), ...s.band.map(([x, , b]) => [x, b]).reverse()]) }));
    const line = draw("polyline", { class: "line", stroke: s.colour, points: path(s.points) });
    line.append(draw("title", {}, s.name)); svg.append(line);
  }
  for (const d of dots) {
    const dot = draw("circle", { class: "dot", cx: px(d.x), cy: py(d.y), r: d.radius || 4, fill: d.colour, "fill-opacity": 0.8 });
    dot.append(draw("title", {}, d.title));
    if (d.click) dot.addEventListener("click", d.click);
    if (d.over) { dot.addEventListener("mouseenter", d.over); dot.addEventListener("mouseleave", hidePeek); }
    svg.append(dot);
  }
  return svg;
}

let peek = null;
function showPeek(event, text, canvas) {
  hidePeek();
  peek = make("div", { id: "peek" }, text);
  if (canvas) peek.append(canvas);
  document.body.append(peek);
  const box = peek.getBoundingClientRect();
  peek.style.left = Math.min(event.clientX + 14, innerWidth - box.width - 8) + "px";
  peek.style.top = Math.min(event.clientY + 14, innerHeight - box.height - 8) + "px";
}
function hidePeek() { if (peek) peek.remove(); peek = null; }
