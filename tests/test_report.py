"""The report: what it says of episodes, and the page in a real browser."""

import os
import re
import shutil

import pytest
from conftest import run, step_of, written
from playwright.sync_api import expect, sync_playwright

import evaluate
from evaluate import STUCK, TASKS, diagnose, gather, interval, over_moves, write_report

MARKUP = "</script></style><img src=x onerror=alert(1)><b>$x$ |` {{ 7 * 7 }} &lt;"
FREE = dict(annotators=["rules"], trajectories=9, calls=0, prompt_tokens=0, completion_tokens=0, dollars=0)


def episode(task: str, variation: int, score: int, **more) -> dict:
    steps = [step_of(score=score, look=f"A room at {n} o'clock.") for n in range(4)]
    said = dict(description="Boil.", split="test", simplifications="easy", agent="hierarchical", subgoals="model",
                models="", parameters={"planner": 10**6, "executor": 10**6}, seen=True, teacher=FREE, ended="done",
                steps=steps, invalid=[0], repaired=[], seconds=1.0)
    return dict(task=task, variation=variation, score=score) | said | more


def report(folder, episodes: list[dict]) -> str:
    """The Markdown of a report on some episodes, its cells without padding, its sentences in one line."""
    write_report([written(folder / "played.jsonl", episodes)], folder / "report")
    return re.sub(r" +|\n(?=\w)", " ", (folder / "report.md").read_text())


def bounds(folder, *agents: list[list[int]]) -> tuple[float, float]:
    """The interval of an agent's copies, each given by its scores in boil; with a second agent, of the difference."""
    tables = []
    for copies in agents:
        played = [episode("boil", n, score, models=str(id(copy))) for copy in copies for n, score in enumerate(copy)]
        tables.append(gather([written(folder / "played.jsonl", played)]))
    return interval(*tables)


# ---- Scores


def test_the_overall_score_is_the_mean_of_the_tasks_means(tmp_path):
    played = [episode("boil", 1, 100), episode("boil", 2, 100), episode("boil", 3, 100), episode("melt", 1, 0)]
    text = report(tmp_path, played)
    assert "| hierarchical | 50.0 (" in text and "| 1-1 boil | 100.0 (" in text and "| 1-2 melt | 0.0 (" in text
    assert "| 25.0% | 4 |" in text  # invalid actions: one step in four
    assert "65.43" in text and "48.72" in text and "ours are of 2 of them" in text


def test_the_interval_is_of_episodes_and_copies_and_that_of_a_difference_of_pairs(tmp_path):
    few, many = (bounds(tmp_path, [[0, 100] * n]) for n in (2, 50))
    assert few[0] < 50 < few[1] and many[0] < 50 < many[1] and many[1] - many[0] < (few[1] - few[0]) / 2
    low, high = bounds(tmp_path, [[20] * 9, [50] * 9, [80] * 9])
    assert 20 <= low < 40 and 60 < high <= 80
    one, *others = ([0, 100] * 5 for _ in range(3))
    assert bounds(tmp_path, [one, *others]) == bounds(tmp_path, [one]), "copies are no further episodes"
    better, worse = [20, 100] * 5, [0, 80] * 5
    assert bounds(tmp_path, [better], [worse]) == (20, 20) and bounds(tmp_path, [better, worse], [worse]) == (0, 20)


def test_several_copies_of_an_agent_count_alike_however_many_episodes_each_played(tmp_path):
    played = [episode("boil", n, 100, models="a") for n in range(9)] + [episode("boil", 0, 0, models="b")]
    text = report(tmp_path, played)
    assert re.search(r"\| hierarchical \| 50.0 \([^|]*\) \| 2 \| 50% \|", text) and "NOT THE SAME EPISODES" in text


@pytest.mark.parametrize("trainings, alone", [(1, True), (2, True), (3, False)])
def test_fewer_than_three_copies_say_nothing_of_the_recipe_and_the_report_says_so(tmp_path, trainings, alone):
    played = [episode("boil", 1, 50, models=str(n), agent=name) for n in range(trainings) for name in ("one", "other")]
    text = report(tmp_path, played)
    for said in ("95% interval of these weights", "need at least three copies", "no finding about how they were"):
        assert (said in text) is alone


def test_agents_that_played_other_episodes_are_not_compared_in_silence(tmp_path):
    flat = dict(agent="flat", subgoals="none")
    same = [episode("boil", n, 100, **more) for n in (1, 2) for more in ({}, flat)]
    assert "NOT THE SAME EPISODES" not in report(tmp_path, same)
    assert "different ones, 2 in common" in report(tmp_path, [*same, episode("boil", 3, 0, **flat)])


def test_all_thirty_tasks_give_the_mean_of_the_24_that_others_report(tmp_path):
    short = ("2-3", "9-1", "9-2", "9-3", "10-1", "10-2")
    played = [episode(name, 1, 10 if id in short else 60) for id, name in map(str.split, TASKS)]
    text = report(tmp_path, played)
    assert "hierarchical 60.0 (" in text and "| hierarchical | 50.0 (" in text and "show the scale" not in text


@pytest.mark.parametrize("second, complaint", [
    (episode("boil", 1, 100), "two.jsonl holds 1-1 boil, variation 1, of hierarchical once more"),
    (episode("boil", 2, 100, split="dev"), "different splits"),
    (episode("bake", 2, 100), "did not play"),
    ({k: v for k, v in episode("boil", 2, 100).items() if k != "ended"}, "did not play"),
])
def test_files_that_do_not_go_together_are_refused_in_one_sentence(tmp_path, refusal, second, complaint):
    files = [written(tmp_path / "one.jsonl", [episode("boil", 1, 0)]), written(tmp_path / "two.jsonl", [second])]
    assert complaint in refusal(evaluate, "--report-only", *files, "--report", tmp_path / "report")
    assert not (tmp_path / "report.md").exists()


def test_both_files_are_byte_for_byte_the_same_from_the_same_episodes(tmp_path):
    flat = episode("boil", 1, 0, agent="flat", subgoals="none")
    path = written(tmp_path / "played.jsonl", [episode("boil", 1, 100), flat])
    done = run("evaluate.py", "--report-only", path, "--report", tmp_path / "a" / "report.md")
    assert done.stdout == write_report([path], tmp_path / "b.md" / "report") + "\n" and "| 1-1 boil" in done.stdout
    for name in ("report.md", "report.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b.md" / name).read_bytes()


def test_an_ablation_is_measured_on_the_episodes_that_both_agents_played(tmp_path):
    random = dict(agent="random", subgoals="random")
    played = [episode("boil", 1, 100), episode("boil", 2, 50), episode("boil", 2, 20, **random)]
    row = "| random | random | 1.0 M | 1.0 M | 20.0 | -30.0 (-30.0 to -30.0) | 1 |"
    assert row in report(tmp_path, played)
    assert "minus" not in report(tmp_path, played[:2])


def test_scores_are_laid_out_by_kinds_of_tasks_where_more_than_one_was_played(tmp_path):
    lengths = {"melt": 87.0, "find-animal": 12.0, "use-thermometer": 20.0}
    played = [episode(task, 1, score, expert_moves=lengths.get(task), seen=task != "melt")
              for task, score in [("melt", 40), ("find-animal", 100), ("use-thermometer", 80), ("boil", 0)]]
    text = report(tmp_path, played)
    assert "| up to 20 | 2 | 90.0 (90.0 to 90.0) |" in text and "| more than 50 | 1 | 40.0 (40.0 to 40.0) |" in text
    assert "| seen | 3 | 60.0 (60.0 to 60.0) |" in text and "| unseen | 1 | 40.0 (40.0 to 40.0) |" in text
    text = report(tmp_path, played[1:])
    assert "nseen" not in text and "hort and long" not in text


def test_the_teachers_bill_is_told_once(tmp_path):
    paid = FREE | dict(annotators=["llm"], calls=9, prompt_tokens=900_000, completion_tokens=100_000, dollars=2.0)
    played = [episode("boil", n, 100, teacher=teacher) for n, teacher in enumerate([FREE, paid, paid])]
    text = report(tmp_path, played)
    assert "by rules: 9 trajectories, 0 LLM calls, 0 tokens, $0.00;" in text
    assert "by llm: 9 trajectories, 9 LLM calls, 1,000,000 tokens, $2.00." in text and text.count("by llm") == 1
    assert "0 tokens." in report(tmp_path, [episode("boil", 1, 100, teacher=FREE | dict(dollars=None))])


# ---- Diagnosis


def test_experts_are_hardly_ever_called_stuck(experts):
    stuck = [len(diagnose({**e, "ended": "done", "invalid": [], "repaired": []})["stuck"]) for e in experts]
    assert sum(stuck) < 0.05 * sum(len(e["steps"]) for e in experts)


@pytest.mark.parametrize("steps, stuck", [
    ([step_of(look=f"It is {n} o'clock.") for n in range(30)], []),
    ([step_of()] * 12, [*range(STUCK, 12)]),
    ([step_of()] * STUCK + [step_of("wait(longer)")] * STUCK, []),
])
def test_an_agent_is_stuck_when_it_repeats_itself_longer_than_experts_need(steps, stuck):
    assert diagnose(episode("boil", 1, 0, steps=steps, ended="moves"))["stuck"] == stuck


@pytest.mark.parametrize("score, ended, ending, broke", [
    (40, "loop", "loop", 4), (40, "moves", "out of moves", 4), (40, "done", "unsolved", 4), (0, "died", "died", 5),
    (100, "done", "solved", None),
])
def test_the_diagnosis_names_the_step_at_which_an_episode_broke(score, ended, ending, broke):
    steps = [step_of(score=n) for n in (0, 20, 20, 40, 40, 40)]
    told = diagnose(episode("boil", 1, score, steps=steps, ended=ended))
    assert (told["ending"], told["broke"]) == (ending, broke)


@pytest.mark.parametrize("actions, ending, shares", [
    (["focus on cup"], "wrong focus", "100% | 0%"),
    (["focus on seed", "0"], "wrong focus", "100% | 0%"),  # the answer to an ambiguous request
    (["focus on wire", "move wire to red box"], "wrong move", "0% | 100%"),
])
def test_what_fails_a_task_for_good_is_a_wrong_focus_only_if_it_was_a_focus(tmp_path, actions, ending, shares):
    steps = [step_of("wait()"), *(step_of("focus_on(a)", action, -100) for action in actions)]
    failed = episode("boil", 1, 0, steps=steps, ended="failed")
    told = diagnose(failed)
    assert (told["ending"], told["broke"]) == (ending, len(actions))
    assert f"| hierarchical | 0% | {shares} |" in report(tmp_path, [failed])


def test_an_agent_without_sub_goals_is_never_stuck_at_one(tmp_path):
    flat = dict(agent="flat", subgoals="none", ended="moves", invalid=[0, 1], repaired=[1])
    lost = episode("boil", 1, 0, steps=[step_of(None)] * 20, **flat)
    assert "| flat | 0% | 0% | 0% | 0% | 100% | 0% | 5% | 5% | | 20.0 |" in report(tmp_path, [lost])
    assert diagnose(lost)["stuck"] == []


# ---- The page


@pytest.fixture(scope="module")
def browser():
    found = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    if not (chromium := next(found, None)):
        missing = "the page is not tested, as Chromium is not installed; on Debian: apt-get install chromium"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> str:
    """The address of a report on two agents, one of them (and all its texts) trying to be markup."""
    folder = tmp_path_factory.mktemp("site")
    walk = [step_of("navigate_to(kitchen)", "go to kitchen", 10), step_of("focus_on(pot)", "focus on cup", -100)]
    long = [step_of("wait()", "wait", 5, look=f"Room {n}.") for n in range(100)]
    evil = [step_of(*[MARKUP] * 2, 1, look=MARKUP, inventory=MARKUP, observation=MARKUP)] * 3
    played = [
        episode("boil", 1, 100),
        episode("boil", 2, 0, steps=walk, ended="failed", invalid=[0], repaired=[0]),
        episode("melt", 7, 5, steps=long, ended="moves", seen=False),
        episode("melt", 7, 1, steps=evil, agent=MARKUP, description=MARKUP, ended="moves", subgoals=MARKUP,
                parameters={"executor": 10**8}, models="x", teacher=FREE | {"annotators": [MARKUP]}),
    ]
    write_report([written(folder / "played.jsonl", played)], folder / "report")
    return (folder / "report.html").as_uri()


@pytest.fixture
def page(browser):
    """A page that must cause no error, no line in the console, no request but for itself, and no dialog."""
    page, heard = browser.new_page(), []
    page.set_default_timeout(10_000)  # milliseconds
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("dialog", lambda dialog: (heard.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: heard.append(request.url) if "report.html" not in request.url else None)
    yield page
    page.close()
    assert heard == []


def visit(page, address: str, agent="hierarchical", task="1-1 boil", variation=1):
    """Open the page and pick an episode; what is picked already needs no choice."""
    page.goto(address)
    for name, label in (("Agent", agent), ("Task", task)):
        page.get_by_role("combobox", name=name).select_option(label=label)
    page.get_by_role("combobox", name="Variation").select_option(str(variation))
    page.wait_for_selector("#actions button")


def test_the_page_opens_with_all_its_plots_and_sections(page, site):
    visit(page, site)
    for name in ("Scores", "Tasks", "Ablations and variants", "Seen and unseen tasks", "Diagnosis", "Cost",
                 "Score over moves", "Replay"):
        assert page.get_by_role("heading", name=name, exact=True).is_visible()
    drawn = page.locator(".curve").evaluate_all("all => all.map(e => e.getBBox()).map(box => [box.width, box.y])")
    assert [pytest.approx(place, abs=1) for place in drawn] == [[600, 140], [600, 198]]


def test_a_curve_holds_the_last_score_of_what_has_ended(tmp_path):
    scores = [(10, 20, 50), (40, -100), (100,)]
    played = [episode("boil", n, 0, steps=[step_of(score=score) for score in each]) for n, each in enumerate(scores)]
    assert over_moves(gather([written(tmp_path / "played.jsonl", played)])) == {"hierarchical": [0, 50, 40, 50]}


def test_buttons_and_arrow_keys_step_through_the_replay(page, site):
    visit(page, site)
    expect(page.locator("#place")).to_have_text("Step 1 of 4, score 100 (+100)")
    for press, number in [("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2), (None, 3), ("ArrowRight", 4),
                          ("ArrowRight", 4)]:
        page.keyboard.press(press) if press else page.get_by_role("button", name="on ›").click()
        expect(page.locator("#place")).to_contain_text(f"Step {number} of 4")
    assert "3 o'clock" in page.locator("#look").inner_text()


def test_actions_stand_under_their_sub_goals_and_what_went_wrong_is_said(page, site):
    visit(page, site, variation=2)
    expect(page.locator("#outcome")).to_have_text("Score 0: wrong focus, went wrong at step 2.")
    listed = page.locator("#actions li").all_inner_texts()
    assert listed == ["navigate_to(kitchen)", "1 go to kitchen", "focus_on(pot)", "2 focus on cup"]
    bands = page.locator("#actions .goal").evaluate_all("all => all.map(e => getComputedStyle(e).backgroundColor)")
    assert len(set(bands)) == 2 and "stood in" in page.locator("#wrong").inner_text()
    page.get_by_role("button", name="2 focus on cup").click()
    assert page.locator("#action").inner_text() == "focus on cup" and "-100" in page.locator("#place").inner_text()
    assert page.locator("#wrong").inner_text() == "here the episode broke: wrong focus"
    visit(page, site, task="1-2 melt", variation=7)
    expect(page.locator("#place")).to_contain_text("of 100")


def test_text_from_an_episode_never_becomes_markup(page, site):
    visit(page, site, agent=MARKUP, task="1-2 melt", variation=7)
    for place in ("description", "goal", "action", "observation", "look", "inventory"):
        expect(page.locator(f"#{place}")).to_have_text(MARKUP)
    assert page.locator("img").count() == page.locator("main b").count() == 0
    assert page.locator("option", has_text=MARKUP).count() == 1
    assert page.locator("th", has_text=MARKUP).count() >= 2
    assert page.locator("figcaption span", has_text=MARKUP).count() == 1
    assert page.evaluate("document.querySelectorAll('script').length") == 2


COLOURS = """() => [...document.querySelectorAll("body *")].flatMap(element => {
  const said = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
  if (!said || !element.checkVisibility() || element.tagName === "SCRIPT") return [];
  let behind = element;
  while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
  const style = getComputedStyle(element);
  return [[element instanceof SVGElement ? style.fill : style.color, getComputedStyle(behind).backgroundColor]];
})"""


def luminance(colour: str) -> float:
    """Of an rgb() colour, as WCAG defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme, behind", [("light", "rgb(255, 255, 255)"), ("dark", "rgb(21, 23, 27)")])
def test_all_text_can_be_read_in_light_and_in_dark(page, site, scheme, behind):
    page.emulate_media(color_scheme=scheme)
    visit(page, site, variation=2)
    expect(page.locator("#place")).to_contain_text("of 2")
    colours = page.evaluate(COLOURS)
    assert len(colours) > 100 and behind in {background for _, background in colours}
    for pair in colours:
        dark, light = sorted(map(luminance, pair))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, pair


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_never_scrolls_sideways(page, site, width):
    page.set_viewport_size({"width": width, "height": 800})
    for agent in ("hierarchical", MARKUP):
        visit(page, site, agent, "1-2 melt", 7)
        assert page.evaluate("document.documentElement.scrollWidth") == width
