"""`python -m gptjax env`: complete, honest about what is unknown, and without secrets."""

import importlib.metadata
import json

import jax

from gptjax.commands import env


def test_versions_devices_and_settings_are_told(capsys, monkeypatch):
    monkeypatch.setenv("XLA_SOMETHING", "1")
    monkeypatch.setenv("HF_TOKEN", "a-secret")
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    assert env.main(["--json", "-"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed)
    assert found["versions"]["jax"] == jax.__version__
    assert found["devices"]["count"] == 8
    assert found["devices"]["peak_bfloat16_flops"] is None, "a CPU's peak is not in the table"
    assert found["machine"]["cores"] >= 1
    assert found["settings"]["XLA_SOMETHING"] == "1"
    assert "a-secret" not in printed
    packages = found["optional packages"]
    assert packages["matplotlib"] == importlib.metadata.version("matplotlib")
    assert set(packages) == set(env.OPTIONAL)
    assert env.main([]) == 0
    text = capsys.readouterr().out
    assert f"jax: {jax.__version__}" in text
    assert "peak_bfloat16_flops: unknown" in text
    assert f"matplotlib: {packages['matplotlib']}" in text


def test_a_missing_package_is_null_and_one_without_a_version_is_there(capsys, monkeypatch):
    monkeypatch.setattr(env, "OPTIONAL", ("no_such_package", "json"))
    assert env.main(["--json", "-"]) == 0
    packages = json.loads(capsys.readouterr().out)["optional packages"]
    assert packages == {"no_such_package": None, "json": "of unknown version"}
    assert env.main([]) == 0
    assert "no_such_package: missing" in capsys.readouterr().out


def test_a_broken_installation_is_reported(capsys, monkeypatch):
    def broken():
        raise RuntimeError("no driver\nfound")

    monkeypatch.setattr(jax, "devices", broken)
    assert env.main([]) == 0
    text = capsys.readouterr().out
    assert "broken: RuntimeError: no driver found" in text
    assert "memory_bytes" in text
