"""The tables of lessons and their pictures are what the notebooks say."""

from nanods.bench import lessons_page
from nanods.bench.lessons_page import LESSONS, PICTURES, ROOT, read_lessons


def test_the_lessons_in_the_pages_are_those_of_the_notebooks():
    lessons, readme = read_lessons(), (ROOT / "README.md").read_text(encoding="utf-8")
    page = (LESSONS / "README.md").read_text(encoding="utf-8")
    assert lessons_page.lessons_page(lessons) == page, "run `make docs`"
    assert lessons_page.readme_with_lessons(readme, lessons) == readme, "run `make docs`"
    for lesson in lessons:
        assert (PICTURES / f"{lesson.number}.png").read_bytes() == lesson.picture, "run `make docs`"


def test_each_lesson_says_what_it_is_for():
    for lesson in read_lessons():
        assert len(lesson.goals) == 3 and all(lesson.goals), lesson.file
        assert 5 <= lesson.minutes_to_read <= 90 and 5 <= lesson.minutes_to_do <= 180, lesson.file
        assert lesson.difficulties and set(lesson.difficulties) <= {1, 2, 3, 4, 5}, lesson.file
