"""`infini-train eval RUN`: perplexity with and without its command's name."""

import json


def test_perplexity_may_be_left_out(run, capsys, call):
    found = []
    for command in (["eval"], ["eval", "perplexity"]):
        for words in ([run, "--max-tokens", 64, "--json"], ["--json", "--max-tokens", 64, run]):
            capsys.readouterr()
            assert call(*command, *words) == 0
            found.append(json.loads(capsys.readouterr().out)["loss"])
    assert len(found) == 4 and len(set(found)) == 1
