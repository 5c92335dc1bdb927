"""YAML documents for people to read."""

import yaml

from gpt_jax.launch.manifest import write_manifest


def test_a_manifest_has_its_comments_the_order_of_its_keys_and_readable_scripts():
    document = {"name": "a", "script": "one\ntwo\n", "count": 1, "code": "042"}
    text = write_manifest(["create: apply", "delete: remove"], document)
    assert text == "# create: apply\n# delete: remove\nname: a\nscript: |\n  one\n  two\ncount: 1\ncode: '042'\n"
    assert yaml.safe_load(text) == document
