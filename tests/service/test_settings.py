"""Settings come from MEDLEY_*, and the documented table is the true one."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError
from pydantic_core import PydanticUndefined

from service.settings import Settings

TABLE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_the_documented_table_is_the_true_one() -> None:
    rows = [line for line in TABLE.read_text().splitlines() if line.startswith("| `MEDLEY_")]
    expected = []
    for name, field in Settings.model_fields.items():
        assert field.default is not PydanticUndefined
        default = "" if field.default is None else f"`{_written(field.default)}`"
        expected.append(f"| `MEDLEY_{name.upper()}` | {default} | {field.description} |")

    assert rows == expected


def _written(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDLEY_PORT", "9000")
    monkeypatch.setenv("MEDLEY_MAX_WAIT_MS", "2.5")
    monkeypatch.setenv("MEDLEY_ADMIN_KEY", "s3cret")
    monkeypatch.setenv("MEDLEY_BUCKETS", "1,8,64")
    settings = Settings()

    assert (settings.port, settings.max_wait_s) == (9000, 0.0025)
    assert "s3cret" not in repr(settings)
    assert settings.buckets == (1, 8, 64)


def test_what_the_environment_does_not_say_may_be_in_files_of_secrets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MEDLEY_READ_KEY", "of the environment")
    for name in ("medley_admin_key", "medley_read_key", "something_else"):
        (tmp_path / name).write_text("of a file\n")
    settings = _read_with_secrets(tmp_path)

    assert settings.admin_key == SecretStr("of a file")
    assert settings.read_key == SecretStr("of the environment")
    assert _read_with_secrets(tmp_path / "none").admin_key is None


def _read_with_secrets(folder: Path) -> Settings:
    given: dict[str, Any] = {"_secrets_dir": folder}
    return Settings(**given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "x"),
        ("buckets", "0"),
        ("buckets", "1,6"),
        ("buckets", "8,1"),
        ("buckets", "1,1"),
        ("buckets", ""),
        ("buckets", "x"),
        ("max_top_k", 33),
        ("queue_limit", 1),
        ("surprise", 1),
    ],
)
def test_a_wrong_setting_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValidationError):
        Settings.model_validate({name: value})


@pytest.mark.parametrize(
    ("host", "key", "allowed"),
    [
        ("127.0.0.1", None, True),
        ("::1", None, True),
        ("localhost", None, True),
        ("0.0.0.0", None, False),
        ("example.org", None, False),
        ("0.0.0.0", "k", True),
    ],
)
def test_changes_need_a_key_or_a_loopback_host(host: str, key: str | None, allowed: bool) -> None:
    assert Settings(host=host, admin_key=SecretStr(key) if key else None).changes_allowed is allowed
