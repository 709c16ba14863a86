"""Folders of kernel caches: code is trusted where nobody else can put it."""

import os

from tiles.cache import folder_trust as trust


def test_folders_that_others_can_write_to_are_not_trusted(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    assert trust.why_folder_untrusted(folder) is None
    folder.mkdir(mode=0o755)
    file = folder / "a.json"
    file.write_text("{}")
    file.chmod(0o644)
    (folder / "studies").mkdir()
    (folder / "studies").chmod(0o777)  # no kernel is read from there
    assert trust.why_folder_untrusted(folder) is None
    for path, before in ((folder, 0o755), (file, 0o644)):
        path.chmod(before | 0o002)
        assert trust.why_folder_untrusted(folder) == f"everybody may change {path}: chmod o-w {path}"
        path.chmod(before | 0o020)
        assert trust.why_folder_untrusted(folder) is None  # a group that the owner, who is the user, has let in
        with monkeypatch.context() as somebody:
            somebody.setattr(os, "getuid", lambda: os.geteuid() + 1)
            somebody.setattr(trust, "ROOT", -1)
            assert "another user's and a group may change it" in trust.why_folder_untrusted(folder)
        path.chmod(before)
        with monkeypatch.context() as somebody:
            somebody.setattr(os, "getuid", lambda: os.geteuid() + 1)
            assert trust.why_folder_untrusted(folder) is None


def test_a_file_that_vanishes_meanwhile_hides_no_other(tmp_path):
    """Other processes replace files in a cache at any time."""
    (tmp_path / "a.json").symlink_to(tmp_path / "gone")
    (tmp_path / "b.json").write_text("{}")
    (tmp_path / "c.json").symlink_to(tmp_path / "gone")
    assert trust.why_folder_untrusted(tmp_path) is None
    (tmp_path / "b.json").chmod(0o666)
    assert "everybody may change" in trust.why_folder_untrusted(tmp_path)
