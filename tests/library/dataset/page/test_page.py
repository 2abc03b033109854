"""The page as a whole: what it says, and that nothing in it can break it or reach outside."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from library.dataset.items import SubsetSettings
from library.dataset.page.facts import Duplicates, gather_facts
from library.dataset.page.html import VOID
from library.dataset.page.page import PageContent, page_html, write_page
from library.dataset.page.pictures import choose, draw
from library.errors import OutputError
from tests.library.dataset.page.page_parts import count_words, make_item, save_picture, showings_of, training_set, with_masks

ATTACK = "</p><script>alert('x')</script><img src=http://evil.example/x onerror=alert(1)> & \"quotes\""


class Reader(HTMLParser):
    """Collects the page's elements, and fails where one is closed that is not open."""

    def __init__(self):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag, class_=None):
        return [attrs for name, attrs in self.elements if name == tag and class_ in (None, *(attrs.get("class") or "").split())]


def read(html):
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


def content_of(data, *, shown=None, duplicates=(), **more):
    showings = showings_of(data)
    facts = gather_facts(data, showings, processes=1, count_tokens=count_words, duplicates=duplicates)
    items = choose(data.all_items, **(shown or {}))
    with ThreadPoolExecutor(1) as pool:
        pictures = {item.index: drawn for item, drawn in zip(items, draw(items, showings, pool=pool), strict=True)}
    return PageContent(
        title="my set",
        architecture="tiny",
        facts=facts,
        showings=showings,
        count_tokens=count_words,
        pictures=pictures,
        warnings=more.pop("warnings", ()),
        **more,
    )


@pytest.fixture
def rich(tmp_path):
    """A set with something of everything."""
    masked = make_item(tmp_path, "masked.png", mask_path=tmp_path / "mask.png", custom_attributes={"style": ATTACK})
    Image.new("L", masked.size_wh, 128).save(tmp_path / "mask.png")
    regular = SubsetSettings(place="there", image_dir=tmp_path, is_reg=True)
    shuffled = SubsetSettings(place="here", image_dir=tmp_path, shuffle_caption=True, flip_aug=True)
    items = [
        masked,
        make_item(tmp_path, "long.png", "one two three four five six seven eight"),
        make_item(tmp_path, "attack.png", ATTACK),
        make_item(tmp_path, "none.png", ""),
        make_item(tmp_path, "shuffled.png", "صورة, 家, 👩\u200d👧, x", subset=shuffled),
        make_item(tmp_path, "small.png", size_wh=(32, 48), subset=regular, subset_index=1),
    ]
    held_out = make_item(tmp_path, "held out.png")
    data = training_set([save_picture(item) for item in items], [save_picture(held_out)])
    return replace(data, skipped=("bad.png cannot be read: empty",))


def page_of(data, **more):
    html = page_html(content_of(data, **more))
    return html, read(html)


def test_nothing_comes_from_outside_and_every_link_has_a_target(rich):
    html, page = page_of(rich, warnings=("look at http://warning.example",))
    for _, attrs in page.elements:
        assert attrs.get("src", "data:").startswith("data:")
        assert attrs.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in attrs)
        assert "url(" not in (attrs.get("style") or "")
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {attrs["href"][1:] for attrs in page.all("a")} <= set(ids)
    assert len(page.all("script")) == 1
    style = re.search(r"<style>(.*?)</style>", html, re.S)[1]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(attrs["content"] for attrs in page.all("meta") if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy


def test_texts_of_the_user_stay_texts(rich):
    html, page = page_of(rich, warnings=(ATTACK,), notes=(ATTACK,))
    assert "<script>alert" not in html
    assert sum(ATTACK in text for text in page.texts) >= 4  # warning, note, caption, attribute
    assert all(attrs["src"].startswith("data:image/") for attrs in page.all("img"))


def test_the_head_counts_the_duplicates_that_the_list_names(rich):
    first, second, third, *_ = rich.items
    groups = (Duplicates((first, second, third), False), Duplicates((rich.items[3], rich.validation[0]), False))
    _, page = page_of(rich, duplicates=groups)
    tiles = page.texts[page.texts.index("duplicates") :]
    assert tiles[1] == "5" and "5 files in 2 groups" in page.texts


def test_every_image_has_a_card_with_pictures_crop_and_badges(rich):
    _, page = page_of(rich, duplicates=(Duplicates((rich.items[0], rich.validation[0]), True),))
    assert len(page.all("article", "card")) == 7
    assert len(page.all("svg", "crop")) == 7
    assert len(page.all("img", "mask")) == 1
    assert all(attrs["alt"] for attrs in page.all("img"))
    kinds = {attrs["id"]: attrs["data-kinds"].split() for attrs in page.all("article")}
    assert set(kinds["image-0"]) == {"masked", "cropped", "duplicate"}
    assert set(kinds["image-1"]) == {"cut", "cropped"}
    assert "empty" in kinds["image-3"]
    assert {"reg", "enlarged"} <= set(kinds["image-5"])
    assert {"validation", "duplicate"} <= set(kinds["image-6"])
    assert "captions differ" in page.texts
    assert page.all("svg", "crop")[0]["viewbox"] == "0 0 64 96"
    assert page.all("path", "edge")[0]["d"] == "M0 16h64v64h-64z"


def test_images_of_which_nothing_counts_are_listed_and_marked(tmp_path):
    html, page = page_of(with_masks(tmp_path))
    listed = html[html.index("Empty masks: nothing of these images counts") : html.index("Duplicates")]
    assert [name for name in ("black", "grey", "clear", "solid") if f">{name}.png<" in listed] == ["black", "clear"]
    assert [attrs["id"] for attrs in page.all("article") if "blank" in attrs["data-kinds"].split()] == ["image-0", "image-2"]
    assert "empty masks" in page.texts and "nothing counts" in page.texts
    plain = training_set([save_picture(make_item(tmp_path))])
    assert "empty masks" not in page_of(plain)[1].texts


def test_what_is_cut_is_struck_only_where_no_encoder_sees_it(rich):
    html, page = page_of(rich)
    (lost,) = page.all("mark", "lost")
    assert lost["title"] == "not seen by small"
    assert not page.all("del")
    assert "small 8 of 6 tokens: cut" in page.texts

    def blind(text):
        return [replace(use, cut_at=3) for use in count_words(text)]

    content = replace(content_of(rich), count_tokens=blind)
    assert '<del class="lost" title="not seen by small and large">' in page_html(content)


def test_the_page_says_that_one_version_of_wildcards_is_counted(rich):
    words = "Of captions with wildcards or several lines, one version is counted."
    assert words not in page_of(rich)[1].texts
    first = replace(rich.items[1], subset=replace(rich.items[1].subset, enable_wildcard=True))
    assert words in page_of(replace(rich, items=(rich.items[0], first, *rich.items[2:])))[1].texts


def test_captions_that_change_have_several_examples(rich):
    html, page = page_of(rich)
    assert sum("showing" in text and text.startswith("epoch") for text in page.texts) == 3
    assert 'dir="auto"' in html


def test_counts_and_histograms_cover_what_is_not_shown(tmp_path):
    data = training_set([save_picture(make_item(tmp_path, f"{number}.png", f"tag{number}, all")) for number in range(9)])
    _, page = page_of(data, shown={"per_bucket": 2})
    assert len(page.all("article", "card")) == 2
    assert any(text.startswith("2 of 9 images shown") for text in page.texts)
    assert (
        "2 of 9 images shown: up to 40 of each bucket and 600 in all, and those that the lists of the page begin with"
        in page.texts
    )
    assert "1 to 1 tokens: 0 images" not in page.texts
    titles = [attrs["title"] for attrs in page.all("span") if "tokens:" in (attrs.get("title") or "")]
    assert "1 to 2 tokens: 9 images" in titles or "2 to 2 tokens: 9 images" in titles
    assert "10 different tags" in page.texts
    row = page.texts.index("all")
    assert page.texts[row + 1 : row + 3] == ["9", "100 %"]


def test_long_lists_say_how_much_is_shown(tmp_path):
    items = [make_item(tmp_path, f"{number}.png", "") for number in range(150)]
    data = training_set(items)
    content = replace(content_of(training_set([save_picture(items[0])])), pictures={})
    content = replace(content, facts=gather_facts(data, showings_of(data), processes=1, count_tokens=count_words))
    page = read(page_html(content))
    assert page.texts.count("100 of 150 shown") == 2  # cropped, without caption
    assert not page.all("article")


def test_the_file_is_written_whole_or_not_at_all(rich, tmp_path):
    path = tmp_path / "out" / "page.html"
    size = write_page(path, content_of(rich))
    assert path.stat().st_size == size
    assert path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="could not write"):
        write_page(tmp_path / "file" / "page.html", content_of(rich))
    assert [entry.name for entry in path.parent.iterdir()] == ["page.html"]


def test_a_file_name_that_is_no_text_is_shown_escaped(tmp_path):
    item = save_picture(make_item(tmp_path))
    content = content_of(training_set([item]), warnings=("bad name: \udce4.png",))
    write_page(tmp_path / "page.html", content)
    assert "bad name: \\udce4.png" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_same_set_gives_the_same_page(rich):
    assert page_html(content_of(rich)) == page_html(content_of(rich))
