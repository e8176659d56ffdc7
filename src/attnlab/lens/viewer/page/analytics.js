// The visual analytics of vision transformers (arXiv 2303.13731): importance, strength by hop, patterns.
const built = new Set();
const forgetAnalytics = () => built.clear();
function buildAnalytics(tab) {
  if (built.has(tab)) return;
  built.add(tab);
  const view = $("view-" + tab);
  view.replaceChildren();
  ({ importance: buildImportance, distance: buildDistance, patterns: buildPatterns })[tab](view, data.analytics[tab]);
}
const card = (...children) => make("div", { className: "card" }, ...children);
const headName = (at, head) => `layer ${layers[at].number}, head ${layers[at].heads[head]}`;
const colourOf = i => `var(--k${i % 10})`;
const alongLayers = (i, n) => css(MEASURE, n > 1 ? 0.05 + 0.85 * i / (n - 1) : 0.4);

function patternOf(at, head) {
  const p = data.analytics && data.analytics.patterns;
  if (!p) return "";
  const i = p.heads.findIndex(h => h[0] === at && h[1] === head);
  return i < 0 ? "" : `${p.labels[i]} (cosine ${number(p.cosines[i])})`;
}

function smallMatrix(text, i, side, size) {
  const codes = bytesOf(text).subarray(i * side * side, (i + 1) * side * side);
  const canvas = paint(document.createElement("canvas"), Float32Array.from(codes, c => (c / 255) ** 2), side, side, 1);
  canvas.style.width = canvas.style.height = size + "px";
  return canvas;
}

function buildImportance(view, about) {
  const names = Object.keys(about.scores);
  const body = make("div"), metric = make("select", { "aria-label": "Metric", on: { change: show } }, ...names.map(n => make("option", { value: n }, `${n}: ${about.meaning[n]}`)));
  const group = make("select", { "aria-label": "Images", on: { change: show } }, make("option", { value: "" }, "all images"), ...about.classes.map((c, i) => make("option", { value: i }, `${about.labelled ? "class" : "predicted class"} ${c}`)));
  view.append(card(make("div", { className: "controls" }, make("label", {}, "metric ", metric), make("label", {}, "over ", group)), make("p", { className: "soft small" }, about.about), body));
  function show() {
    const table = group.value === "" ? about.scores[metric.value] : about.perClass[metric.value][+group.value];
    const heads = table.flatMap((row, at) => row.map((score, head) => ({ score, at, head }))).filter(x => x.score !== null);
    heads.sort((a, b) => about.smallest ? a.score - b.score : b.score - a.score);
    const dots = heads.map((x, i) => ({ x: i + 1, y: x.score, colour: alongLayers(x.at, layers.length), title: `${i + 1}. ${headName(x.at, x.head)}: ${number(x.score)}`, click: () => goTo(x.at, x.head) }));
    const places = {};
    for (const n of names) {
      const scores = (group.value === "" ? about.scores[n] : about.perClass[n][+group.value]);
      const sorted = scores.flat().filter(s => s !== null).sort((a, b) => about.smallest ? a - b : b - a);
      places[n] = (at, head) => 1 + sorted.indexOf(scores[at][head]);
    }
    const rows = heads.slice(0, 16).map((x, i) => make("tr", { className: "link", tabIndex: 0, on: { click: () => goTo(x.at, x.head), keydown: e => { if (e.key === "Enter") goTo(x.at, x.head); } } },
      make("td", { className: "number" }, String(i + 1)), make("td", {}, headName(x.at, x.head)), make("td", { className: "number" }, number(x.score)),
      ...names.filter(n => n !== metric.value).map(n => make("td", { className: "number" }, String(places[n](x.at, x.head))))));
    const top = make("table", {}, make("tr", {}, ...["rank", "head", metric.value].map((t, i) => make("th", { className: i === 1 ? "" : "number" }, t)), ...names.filter(n => n !== metric.value).map(n => make("th", { className: "number" }, "rank by " + n))), ...rows);
    const agree = make("table", {}, make("tr", {}, make("th"), ...names.map(n => make("th", { className: "number" }, n))), ...names.map((n, i) => make("tr", {}, make("td", {}, n), ...about.correlation[i].map(c => {
      const cell = make("td", { className: "number" }, c === null ? "–" : c.toFixed(2).replace("-", "−"));
      if (c !== null) cell.style.background = `rgba(var(--hot), ${Math.abs(c) * 0.45})`;
      return cell;
    }))));
    body.replaceChildren(make("div", { className: "pair" },
      make("div", {}, make("h3", {}, "Heads by rank"), chart({ dots, xLabel: "rank", yLabel: metric.value, integers: true }), make("p", { className: "soft small" }, "Darker dots are earlier layers. Click one to see the head."), make("h3", {}, "Do the metrics agree? Spearman's rank correlation over heads"), agree),
      make("div", {}, make("h3", {}, "The first sixteen"), top)));
  }
  show();
}

function buildDistance(view, about) {
  const what = make("select", { "aria-label": "Strength", on: { change: show } }, make("option", { value: "sum" }, "sum: what all patches of a ring receive"), make("option", { value: "mean" }, "mean: what one patch of a ring receives")), body = make("div");
  view.append(card(make("p", { className: "soft small" }, about.about), make("div", { className: "controls" }, make("label", {}, "strength ", what)), body));
  const mean = v => v.reduce((a, b) => a + b, 0) / v.length, spread = v => Math.sqrt(mean(v.map(x => (x - mean(v)) ** 2)));
  function show() {
    const n = about.layers.length, number_ = i => layers[about.layers[i]].number;
    const means = about.distance.map(mean), spreads = about.distance.map(spread);
    const trend = { name: "mean over heads", colour: "var(--accent)", points: means.map((m, i) => [number_(i), m]), band: means.map((m, i) => [number_(i), Math.max(0, m - spreads[i]), m + spreads[i]]) };
    const dots = about.distance.flatMap((row, i) => row.map((d, head) => ({ x: number_(i), y: d, radius: 3, colour: "var(--soft)", title: `${headName(about.layers[i], head)}: ${number(d)} hops`, click: () => goTo(about.layers[i], head) })));
    const byHop = about[what.value].map((heads, i) => ({ name: `layer ${number_(i)}`, colour: alongLayers(i, n), points: heads[0].map((_, k) => [k, mean(heads.map(h => h[k]))]) }));
    const share = { name: "class token's share", colour: "var(--k3)", points: about.prefix.map((row, i) => [number_(i), mean(row)]), band: about.prefix.map((row, i) => [number_(i), Math.max(0, mean(row) - spread(row)), mean(row) + spread(row)]) };
    const bar = make("canvas", { width: 160, height: 10 }), paintBar = bar.getContext("2d");
    for (let x = 0; x < 160; x++) { paintBar.fillStyle = css(MEASURE, 0.05 + 0.85 * x / 159); paintBar.fillRect(x, 0, 1, 10); }
    const parts = [make("div", {}, make("h3", {}, "How far layers look: expected hops, mean ± deviation over heads"), chart({ series: [trend], dots, xLabel: "layer", yLabel: "hops", integers: true, fromZero: true })),
      make("div", {}, make("h3", {}, `Strength by hop, mean over heads`), chart({ series: byHop, xLabel: `hops (${about.hop})`, yLabel: `strength (${what.value})`, integers: true, fromZero: true }), make("div", { className: "legend" }, `layer ${number_(0)}`, bar, `layer ${number_(n - 1)}`))];
    if (about.hasPrefix) parts.push(make("div", {}, make("h3", {}, "What the tokens before the patches receive of the patches' attention"), chart({ series: [share], xLabel: "layer", yLabel: "share", integers: true, fromZero: true })));
    body.replaceChildren(make("div", { className: "pair" }, ...parts));
  }
  show();
}

function buildPatterns(view, about) {
  const groups = Math.max(...about.clusters) + 1, side = about.side;
  const look = i => () => goTo(...about.heads[i]);
  const dots = about.places.map(([x, y], i) => ({ x, y, radius: 5, colour: colourOf(about.clusters[i]), title: headName(...about.heads[i]), click: look(i),
    over: event => showPeek(event, `${headName(...about.heads[i])}: ${about.labels[i]}`, smallMatrix(about.maps, i, side, 150)) }));
  const counts = new Map();
  for (const label of about.labels) counts.set(label, (counts.get(label) || 0) + 1);
  const names = make("table", {}, make("tr", {}, make("th", {}, "nearest template"), make("th", { className: "number" }, "heads"), make("th", { className: "number" }, "layers, mean")),
    ...[...counts].sort((a, b) => b[1] - a[1]).map(([label, count]) => {
      const where = about.heads.filter((_, i) => about.labels[i] === label).map(h => layers[h[0]].number);
      return make("tr", {}, make("td", {}, label), make("td", { className: "number" }, String(count)), make("td", { className: "number" }, number(where.reduce((a, b) => a + b, 0) / where.length)));
    }));
  const clusters = Array.from({ length: groups }, (_, g) => {
    const members = about.heads.map((_, i) => i).filter(i => about.clusters[i] === g), labels = {};
    for (const i of members) labels[about.labels[i]] = (labels[about.labels[i]] || 0) + 1;
    const key = make("span", { className: "key" }); key.style.background = colourOf(g);
    const centre = smallMatrix(about.centres, g, side, 110); centre.className = "centre";
    return card(make("b", {}, key, `${members.length} head${members.length === 1 ? "" : "s"}`), make("p", { className: "soft small" }, Object.entries(labels).sort((a, b) => b[1] - a[1]).slice(0, 3).map(([l, c]) => `${l} ${c}`).join(", ")), centre,
      make("div", { className: "members" }, ...members.slice(0, 24).map(i => make("button", { type: "button", title: `${headName(...about.heads[i])}: ${about.labels[i]} (cosine ${number(about.cosines[i])})`, on: { click: look(i) } }, smallMatrix(about.maps, i, side, 34)))),
      members.length > 24 ? make("p", { className: "soft small" }, `and ${members.length - 24} more`) : "");
  });
  view.append(card(make("p", { className: "soft small" }, about.about), make("div", { className: "pair" },
    make("div", {}, make("h3", {}, "Heads whose maps look alike lie close"), chart({ dots, xLabel: "first axis of the codes", yLabel: "second" })),
    make("div", {}, make("h3", {}, "What they look like"), names))), make("div", { className: "clusters" }, ...clusters));
}
