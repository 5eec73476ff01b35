import re
from pathlib import Path

import progress

SOLUTION = Path(progress.__file__).with_name("07_solutions.py").read_text(encoding="utf-8")


def replace_body(text, name, body):
    """Return the file with another body of the function `name`, without its docstring."""
    return re.sub(
        rf"(def {name}\([^:]*:[^\n]*\n).*?(?=\n\n\ndef |\Z)", rf"\1{body}", text, flags=re.S
    )


def test_it_counts_what_passes_and_names_what_is_wrong_first(tmp_path, capsys):
    text = re.sub(r"-> [^:]*:", ":", SOLUTION)
    text = replace_body(text, "answer_mask", "    raise NotImplementedError")
    text = replace_body(text, "ewc_penalty", "    return (weight - old).sum()")
    (tmp_path / "07_adapt.py").write_text(text, encoding="utf-8")
    assert progress.main([str(tmp_path)]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["07", "adapt", ".###x#", "4", "of", "6"]
    assert lines[2].startswith("next: 07 ewc_penalty: ")


def test_it_says_when_nothing_is_left_and_names_files_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "07_adapt.py").write_text(SOLUTION, encoding="utf-8")
    assert progress.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("All exercises pass.\n")
    (tmp_path / "06_compression.py").write_text("def quantize_rows(x:\n", encoding="utf-8")
    assert progress.main([str(tmp_path)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["06", "compression", "cannot", "be", "read"]
    assert lines[-1].startswith("next: 06: ") and "line 1" in lines[-1]


def test_a_folder_without_exercises_is_named(tmp_path, capsys):
    assert progress.main([str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().out
