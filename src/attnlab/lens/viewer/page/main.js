// The frame of the page: title, tabs, theme and keys.
const TABS = [["heads", "Heads"], ["importance", "Importance"], ["distance", "Distance"], ["patterns", "Patterns"]];
const has = tab => tab === "heads" || Boolean(data.analytics && data.analytics[tab]);

function openTab(tab) {
  if (!has(tab)) return;
  state.tab = tab;
  for (const [name] of TABS) $("view-" + name).hidden = name !== tab;
  for (const b of $("tabs").children) { b.setAttribute("aria-selected", b.dataset.tab === tab); b.tabIndex = b.dataset.tab === tab ? 0 : -1; }
  if (tab !== "heads") buildAnalytics(tab);
}

function goTo(at, head) { openTab("heads"); select(at, head); scrollTo({ top: 0 }); }

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  colourOverview();
  if (layerData) { drawMatrix(); refresh(); }
  forgetAnalytics();
  if (state.tab !== "heads") buildAnalytics(state.tab);
}

$("title").textContent = data.title;
for (const [name, value] of Object.entries(data.facts)) $("facts").append(make("span", {}, `${name} ${value}`));
for (const note of data.notes) $("notes").append(make("li", {}, note));
for (const [name, title] of TABS.filter(([name]) => has(name))) {
  $("tabs").append(make("button", { type: "button", role: "tab", "aria-controls": "view-" + name, "data-tab": name, on: { click: () => openTab(name) } }, title));
}
$("tabs").hidden = $("tabs").children.length < 2;
$("tabs").addEventListener("keydown", event => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key], open = [...$("tabs").children];
  if (!step) return;
  const next = open[(open.findIndex(b => b.dataset.tab === state.tab) + step + open.length) % open.length];
  openTab(next.dataset.tab); next.focus();
});
$("theme").addEventListener("click", () => setTheme(dark() ? "light" : "dark"));
$("help-button").addEventListener("click", () => $("help").showModal());
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(SELECT|INPUT|TEXTAREA)$/.test(event.target.tagName) || $("help").open) return;
  const { key } = event;
  if (key === "?") $("help").showModal();
  else if (key === "d") setDirection(state.direction === "out" ? "in" : "out");
  else if (key === "l") setScale(state.scale === "linear" ? "log" : "linear");
  else if (key === "m" && data.measures.length) { state.measure = (state.measure + 1) % data.measures.length; colourOverview(); }
  else if (key === "v") setShow({ colour: "matrix", matrix: "map", map: "colour" }[state.show]);
  else if (key === "Escape") { state.token = state.pinned = state.key = null; schedule(); }
  else if ("1234".includes(key)) { const tab = $("tabs").children[+key - 1]; if (tab) openTab(tab.dataset.tab); }
});

document.documentElement.dataset.theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", event => setTheme(event.matches ? "dark" : "light"));
buildOverview();
colourOverview();
bindStage();
openTab("heads");

function fromAddress() {
  const asked = /^#L(\d+)H(\d+)$/.exec(location.hash);
  const at = asked ? layers.findIndex(l => l.number === +asked[1]) : -1, head = at < 0 ? -1 : layers[at].heads.indexOf(+asked[2]);
  if (head >= 0) return [at, head];
  const first = data.measures.findIndex(m => m.name === "importance"), best = first < 0 ? null : data.measures[first];
  if (!best) return [0, 0];
  const flat = best.values.flatMap((row, i) => row.map((v, j) => [v, i, j])).filter(x => x[0] !== null).sort((a, b) => b[0] - a[0])[0];
  return flat ? [flat[1], flat[2]] : [0, 0];
}
addEventListener("hashchange", () => { const [at, head] = fromAddress(); select(at, head, true); });
select(...fromAddress(), true).then(() => { document.documentElement.dataset.ready = String(Math.round(performance.now())); });
