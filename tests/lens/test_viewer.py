"""The page of attention: what it is made of, and how it works in a real browser."""

import math
import os
import re
import time

import pytest
import torch

from attnlab.lens.measures.spatial import strength
from attnlab.lens.viewer import Measure, Tokens, View, analytics
from attnlab.lens.viewer.pack import unpack

CHROMIUM = "/usr/bin/chromium"
_BYTES = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
PIXEL = f"data:image/png;base64,{_BYTES}"


def attention(*shape, sharp=3.0):
    return torch.randn(*shape).mul(sharp).softmax(-1)


# What a page is made of


def test_a_page_names_nothing_elsewhere_and_text_cannot_break_out():
    labels = ("</script><script>alert(1)</script>", "<b>", "&amp;", "a\u2028b")
    page = View.of(attention(1, 1, 4, 4), Tokens(4, labels), title="</title><script>alert(2)</script>").html()
    assert not re.search(
        r"<link(?! rel=\"icon\" href=\"data:)|@import|(src|href)=\"(?!data:)|https?://(?!www\.w3)", page
    )
    assert "alert(1)</script>" not in page and "<script>alert" not in page
    assert "default-src 'none'" in page


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tokens(4, ("a",)), "labels must be 4"),
        (lambda: Tokens(4, grid=(2, 2), start=1), r"grid \(2, 2\) from token 1 on does not fit 4 tokens"),
        (lambda: Tokens(4, image="https://example.org/cat.png"), "image must be a data URL"),
        (lambda: View([]), "there is no layer"),
        (lambda: View.of(torch.rand(2, 3, 4, 5)), r"weights must be \(L, H, N, N\)"),
        (lambda: View([(1, Tokens(3), Tokens(3))]).add("x", torch.rand(1, 3, 4)), r"weights of x must be \(1, 3, 3\)"),
        (lambda: View.of(torch.full((1, 1, 3, 3), torch.nan)), "not finite"),
        (lambda: View([(1, Tokens(3), Tokens(3))]).html(), "0 of 1 layers"),
        (lambda: View.of(torch.rand(1, 2, 3, 3), measures=[Measure("x", [[1.0]])]).html(), "a number for each head"),
    ],
)
def test_what_cannot_be_shown_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    view = View.of(attention(1, 1, 3, 3))
    path = view.write(tmp_path / "new" / "page.html")
    assert path.read_text().rstrip().endswith("</html>") and os.listdir(path.parent) == ["page.html"]
    with pytest.raises(IsADirectoryError, match="is a folder"):
        view.write(tmp_path)


def test_a_record_becomes_a_page_with_its_layers_heads_labels_and_grid():
    from attnlab import lens
    from attnlab.models.skeletons.plain import Plain

    model = Plain(dim=32, depth=3, mixer="multihead", mixer_options=dict(heads=4), image=12, patch=4, num_classes=2)
    with torch.no_grad(), lens.watch(model, layers=[0, 2], heads=[1, 3], grid=(3, 3)) as record:
        model(torch.randn(2, 3, 12, 12))
    view = View.of_record(record, sample=1, image=PIXEL)
    assert [(x["number"], x["heads"], x["name"]) for x in view.layers] == [
        (0, [1, 3], "encoder.blocks.0.mixer"),
        (2, [1, 3], "encoder.blocks.2.mixer"),
    ]
    assert view.tokens == [Tokens(10, None, (3, 3), 1, PIXEL)] and view.title == "Plain"
    torch.testing.assert_close(unpack(view.blobs[1], view.layouts[1]), record[2][1], rtol=0.02, atol=2e-3)
    with torch.no_grad(), lens.watch(model, keep="stats") as record:
        model(torch.randn(1, 3, 12, 12))
    with pytest.raises(ValueError, match="this one holds stats"):
        View.of_record(record)


# In a browser


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="the page is tested through playwright")
    if not os.path.exists(CHROMIUM):
        pytest.skip(f"no browser at {CHROMIUM}")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium):
    """Opens pages; at the end none of them may have complained."""
    complaints, contexts = [], []

    def open_page(path, **options):
        context = chromium.new_context(viewport={"width": 1400, "height": 1000}, offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(request.url[:80]))
        start = time.perf_counter()
        page.goto(f"file://{path}")
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        page.opened_in = time.perf_counter() - start
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


LAYERS, HEADS, GRID = 3, 4, (5, 6)
COUNT = 1 + GRID[0] * GRID[1]


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """Weights of a small vision transformer, and their page with everything on it."""
    torch.manual_seed(0)
    weights = attention(LAYERS, HEADS, COUNT, COUNT)
    labels = ("[class]", *(f"row {i // 6}, column {i % 6}" for i in range(30)))
    view = View.of(weights, Tokens(COUNT, labels, GRID, 1, PIXEL), title="a small one", facts={"model": "toy"})
    entropy = -torch.xlogy(weights, weights).sum(-1).mean(-1)
    view.measures = [Measure("importance", torch.rand(LAYERS, HEADS).tolist(), "bits"),
                     Measure("entropy", entropy.tolist(), "nats", "How widely a query looks.")]  # fmt: skip
    from attnlab.lens.measures.patterns import find
    from attnlab.lens.measures.pruning import Answer, importance

    logits = torch.randn(6, 5)
    noise = {layer: torch.randn(HEADS, 6, 5) for layer in range(LAYERS)}

    def answer(pruned):
        drift = sum((noise[layer][which].sum(0) for layer, which in pruned.items()), torch.zeros(6, 5))
        return Answer(logits + drift, logits + drift)

    scores = importance(answer, [HEADS] * LAYERS, torch.arange(6) % 5)
    heads = [list(range(HEADS))] * LAYERS
    maps = weights[..., 1:, 1:].flatten(0, 1)
    where = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
    found = strength(weights[None], GRID)
    view.analytics = {
        "importance": analytics.importance(scores, range(LAYERS), heads, 6, True),
        "distance": analytics.distance(found, [(i, i) for i in range(LAYERS)], heads, 1),
        "patterns": analytics.patterns(find(maps, GRID, clusters=3, epochs=2), maps, where, GRID, 1),
    }
    return weights, view.write(tmp_path_factory.mktemp("vision") / "page.html"), found


def place(page, token):
    """The middle of a patch on the screen."""
    box = page.locator("canvas.patches").bounding_box()
    row, column = divmod(token - 1, GRID[1])
    return box["x"] + box["width"] * (column + 0.5) / GRID[1], box["y"] + box["height"] * (row + 0.5) / GRID[0]


def read_out(page):
    """What the page says the strongest are: {name: weight}."""
    page.wait_for_timeout(80)  # drawn at the next frame
    return {row.locator("span").nth(0).inner_text(): float(row.locator("span").nth(1).inner_text())
            for row in page.locator("#readout .bar").all()}  # fmt: skip


def wanted(values, labels):
    strongest, at = values.topk(5)
    return {
        labels[i]: pytest.approx(v, rel=0.03, abs=2e-3) for v, i in zip(strongest.tolist(), at.tolist(), strict=True)
    }


def names(count=COUNT):
    return ["[class] · 0", *(f"row {i // 6}, column {i % 6}" for i in range(count - 1))]


def test_clicking_a_head_and_hovering_a_patch_shows_where_it_looks(opened, vision):
    weights, path, _ = vision
    page = opened(path)
    assert page.title() == "a small one" and page.locator("#facts").inner_text() == "model toy"
    page.click('[data-head="2.1"]')
    page.wait_for_selector("html[data-shown='2.1']")
    assert page.locator("#head-title").inner_text() == "Layer 2 · head 1"
    assert page.url.endswith("#L2H1")
    assert read_out(page) == wanted(weights[2, 1].mean(0), names())  # nothing hovered: what is received
    page.mouse.move(*place(page, 9))
    assert read_out(page) == wanted(weights[2, 1, 9], names())
    assert "“row 1, column 2” looks at" in page.locator("#readout").inner_text()
    page.click("[data-direction=in]")
    page.mouse.move(*place(page, 9))
    assert read_out(page) == wanted(weights[2, 1, :, 9], names())
    page.hover(".singles .token")
    assert read_out(page) == wanted(weights[2, 1, :, 0], names())


def test_a_clicked_patch_stays_until_it_is_let_go(opened, vision):
    weights, path, _ = vision
    page = opened(f"{path}#L0H2")
    page.mouse.click(*place(page, 20))
    page.mouse.move(*place(page, 3))
    assert read_out(page) == wanted(weights[0, 2, 20], names())
    page.click('[data-head="1.0"]')  # the same patch in another head
    page.wait_for_selector("html[data-shown='1.0']")
    assert read_out(page) == wanted(weights[1, 0, 20], names())
    page.locator("#strip button").nth(3).click()
    page.wait_for_selector("html[data-shown='1.3']")
    assert read_out(page) == wanted(weights[1, 3, 20], names())
    page.keyboard.press("Escape")
    assert read_out(page) == wanted(weights[1, 3].mean(0), names())


def test_the_matrix_says_query_and_key(opened, vision):
    weights, path, _ = vision
    page = opened(f"{path}#L1H1")
    box = page.locator("#matrix").bounding_box()
    key = int(weights[1, 1, 12].argmax())
    page.mouse.move(box["x"] + box["width"] * (key + 0.5) / COUNT, box["y"] + box["height"] * 12.5 / COUNT)
    assert read_out(page) == wanted(weights[1, 1, 12], names())
    told = re.search(rf"at “{names()[key]}” with ([\d.]+)", page.locator("#readout").inner_text())
    assert float(told[1]) == pytest.approx(float(weights[1, 1, 12, key]), rel=0.02)


def test_everything_works_from_the_keyboard(opened, vision):
    weights, path, _ = vision
    page = opened(f"{path}#L0H0")
    page.focus('[data-head="0.0"]')
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("html[data-shown='1.1']")
    assert page.evaluate("document.activeElement.dataset.head") == "1.1"
    page.focus("#stage")
    for key in ("ArrowRight", "ArrowRight", "ArrowDown"):  # the class token, the first patch, the one below
        page.keyboard.press(key)
    assert read_out(page) == wanted(weights[1, 1, 7], names())
    page.keyboard.press("d")
    assert read_out(page) == wanted(weights[1, 1, :, 7], names())
    before = page.locator("#measure").input_value()
    page.keyboard.press("m")
    assert page.locator("#measure").input_value() != before
    page.keyboard.press("l")
    assert page.get_attribute("[data-scale=log]", "aria-pressed") == "true"
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("3")
    assert page.locator("#view-distance").is_visible() and not page.locator("#view-heads").is_visible()


def test_the_overview_is_coloured_by_the_chosen_measure_with_a_legend(opened, vision):
    weights, path, _ = vision
    page = opened(path)
    page.select_option("#measure", label="entropy")
    entropy = -torch.xlogy(weights, weights).sum(-1).mean(-1)
    cells = page.locator("#grid .cell")
    assert cells.count() == LAYERS * HEADS
    colours = page.evaluate(
        "[...document.querySelectorAll('#grid .cell')].map(c => getComputedStyle(c).backgroundColor)"
    )
    page.wait_for_timeout(250)  # colours fade
    colours = page.evaluate(
        "[...document.querySelectorAll('#grid .cell')].map(c => getComputedStyle(c).backgroundColor)"
    )
    assert colours[int(entropy.argmax())] == "rgb(253, 231, 37)" and colours[int(entropy.argmin())] == "rgb(68, 1, 84)"
    assert float(page.locator("#legend-low").inner_text()) == pytest.approx(float(entropy.min()), rel=0.01)
    assert page.locator("#legend-high").inner_text().endswith(" nats")
    assert page.locator("#measure-about").inner_text() == "How widely a query looks."
    for what in ("matrix", "map"):
        page.click(f"[data-show={what}]")
        assert "url(" in page.evaluate("document.querySelector('#grid .cell').style.backgroundImage")


def test_importance_distance_and_patterns_lead_to_the_heads(opened, vision):
    _, path, found = vision
    page = opened(path)
    page.click("[data-tab=importance]")
    page.locator("#view-importance select").nth(0).select_option("cls_cos")
    page.locator("#view-importance select").nth(1).select_option("2")
    first = page.locator("#view-importance tr.link").first
    layer, head = re.search(r"layer (\d), head (\d)", first.inner_text()).groups()
    first.click()
    page.wait_for_selector(f"html[data-shown='{layer}.{head}']")
    assert page.locator("#view-heads").is_visible()
    page.click("[data-tab=distance]")
    dots = page.locator("#view-distance circle")
    assert dots.count() == LAYERS * HEADS
    told = re.search(r"layer (\d), head (\d): ([\d.]+) hops", dots.nth(5).locator("title").text_content())
    assert float(told[3]) == pytest.approx(float(found.distance[int(told[1]), int(told[2])]), rel=0.01)
    dots.nth(5).click()
    page.wait_for_selector(f"html[data-shown='{told[1]}.{told[2]}']")
    page.click("[data-tab=patterns]")
    assert page.locator("#view-patterns circle").count() == LAYERS * HEADS
    page.locator("#view-patterns circle").first.hover(force=True)
    assert page.locator("#peek canvas").is_visible()
    page.mouse.move(2, 2)
    page.locator("#view-patterns .members button").first.click()
    assert page.locator("#view-heads").is_visible() and "pattern" in page.locator("#chips").inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_system_and_the_button(opened, vision, scheme):
    page = opened(vision[1], color_scheme=scheme)
    assert page.get_attribute("html", "data-theme") == scheme
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.get_attribute("html", "data-theme") != scheme
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != background


def test_a_text_is_read_word_by_word(opened, tmp_path):
    words = ("The", " cat", " sat", "\n", " on", " <b>it</b>", " ", ".")
    weights = attention(2, 2, 8, 8).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    page = opened(View.of(weights, Tokens(8, words)).write(tmp_path / "text.html"))
    page.click('[data-head="1.1"]')
    page.wait_for_selector("html[data-shown='1.1']")
    page.hover(".token >> nth=5")
    labels = [f"{w.strip() or '␣'} · {i}" for i, w in enumerate(words)]
    assert read_out(page) == wanted(weights[1, 1, 5], labels)
    shade = "getComputedStyle(document.querySelectorAll('.token')[{}]).backgroundColor"
    assert page.evaluate(shade.format(7)) == "rgba(0, 0, 0, 0)"  # the future
    assert page.evaluate(shade.format(int(weights[1, 1, 5].argmax()))) == "rgba(217, 98, 43, 0.9)"
    assert page.locator("#tabs").is_hidden()


def test_cross_attention_has_queries_and_keys_apart(opened, tmp_path):
    weights = attention(2, 3, 7)
    view = View([(2, Tokens(3, ("one", "two", "three")), Tokens(7))])
    view.add("cross", weights)
    page = opened(view.write(tmp_path / "cross.html"))
    assert page.locator(".panel figcaption").all_inner_texts() == ["queries", "keys"]
    page.hover(".panel >> nth=0 >> .token >> nth=1")
    assert read_out(page) == wanted(weights[0, 1], [f"token {i}" for i in range(7)])
    page.hover(".panel >> nth=1 >> .token >> nth=4")
    page.wait_for_timeout(80)
    assert "“token 4” is looked at by" in page.locator("#readout").inner_text()
    assert page.get_attribute("[data-direction=in]", "aria-pressed") == "true"


def test_patches_within_a_text_are_on_the_image_and_words_beside_it(opened, tmp_path):
    labels = ("what", *(f"row {i // 2}, column {i % 2}" for i in range(4)), *(f" word{i}" for i in range(20)))
    weights = attention(1, 1, 25, 25)
    page = opened(View.of(weights, Tokens(25, labels, (2, 2), 1, PIXEL)).write(tmp_path / "mixed.html"))
    assert page.locator(".token").count() == 21 and "2×2 patches" in page.locator(".panel").inner_text()
    page.hover(".token >> nth=3")  # after the four patches: token 7
    names = [label.strip() if 1 <= i < 5 else f"{label.strip()} · {i}" for i, label in enumerate(labels)]
    assert read_out(page) == wanted(weights[0, 0, 7], names)


def test_a_large_vision_transformer_opens_fast_and_stays_small(opened, tmp_path):
    """24 layers, 16 heads, 577 tokens: under 3 seconds and 20 MB, every patch hoverable."""
    grid, count = (24, 24), 577
    tokens = Tokens(count, None, grid, 1, PIXEL)
    view = View([(16, tokens, tokens)] * 24)
    torch.manual_seed(0)
    weights = attention(16, count, count)
    for layer in range(24):
        # The same numbers in another order: drawing new ones takes longer than packing them.
        view.add(f"blocks.{layer}.attn", weights.roll((layer, 7 * layer), (0, 2)))
    view.measures = [Measure("entropy", torch.rand(24, 16).tolist(), "nats")]
    path = view.write(tmp_path / "large.html")
    assert path.stat().st_size < 20e6
    assert "strongest keys" in view.html()
    page = opened(path)
    print(f"{path.stat().st_size / 1e6:.1f} MB opened in {page.opened_in:.2f} s")
    assert min(page.opened_in, opened(path).opened_in) < 3
    page.click('[data-head="23.5"]')
    page.wait_for_selector("html[data-shown='23.5']")
    box = page.locator("canvas.patches").bounding_box()
    page.mouse.move(box["x"] + box["width"] * 10.5 / 24, box["y"] + box["height"] * 3.5 / 24)
    last = weights.roll((23, 161), (0, 2))[5, 1 + 3 * 24 + 10]
    labels = ["token 0", *(f"row {i // 24}, column {i % 24}" for i in range(576))]
    assert read_out(page) == wanted(last, labels)
    assert math.isclose(view.layers[0]["kept"], float(weights.topk(8).values.sum() / weights.sum()), abs_tol=1e-3)
