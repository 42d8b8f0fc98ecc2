"""What EasyEdit's users bring: hyper-parameter files, and the columns of its `edit` call."""

import json

import pytest

from wise_fast import Edit, WiseConfig
from wise_fast.data import Locality, as_edits
from wise_fast.easyedit import config_from_hparams, config_from_yaml, requests
from wise_fast.errors import ConfigError, EditDataError
from wise_fast.settings import build_config

HPARAMS = """
alg_name: "WISE"
model_name: "./somewhere/llama-2-7b"
device: 1
mask_ratio: 0.25
edit_lr: 0.9
n_iter: 50
norm_constraint: 1.5
act_margin: [4.0, 19.0, 9.0] # alpha, beta, gamma
act_ratio: 0.88
save_freq: 500
merge_freq: 1000
merge_alg: 'ties'
objective_optimization: 'only_label'
inner_params:
- model.layers[27].mlp.down_proj.weight
densities: 0.53
weights: 1.0
retrieve: False
replay: False
model_parallel: False
"""


@pytest.fixture
def hparams(tmp_path):
    def write(text=HPARAMS, **changes):
        lines = [line for line in text.strip().splitlines() if line.split(":")[0] not in changes]
        lines += [f"{key}: {value}" for key, value in changes.items() if value is not None]
        file = tmp_path / "WISE.yaml"
        file.write_text("\n".join(lines))
        return file

    return write


def without(text, key):
    return "\n".join(line for line in text.splitlines() if not line.startswith(key))


class TestYaml:
    def test_every_setting_has_its_place(self, hparams):
        config, notes = config_from_yaml(hparams())
        assert config == WiseConfig.paper(
            mask_ratio=0.25,
            lr=0.9,
            max_steps=50,
            clamp=1.5,
            alpha=4.0,
            beta=19.0,
            gamma=9.0,
            act_ratio=0.88,
            shard_size=500,
            shards=2,
            mode="merge",
            density=0.53,
            layer=27,
        )
        assert [note.split()[0] for note in notes] == ["model_name", "device"]
        assert "'./somewhere/llama-2-7b' is not used: name the model" in notes[0]

    def test_what_is_absent_is_the_papers(self):
        config, notes = config_from_hparams({"alg_name": "WISE", "save_freq": 10})
        assert config == WiseConfig.paper(mode="merge", shard_size=10) and notes == []

    @pytest.mark.parametrize(
        "changes, expected",
        [
            ({"retrieve": "True"}, {"mode": "retrieve", "shard_size": 500}),
            ({"merge_freq": 2000}, {"shards": 4}),
            ({"save_freq": "null"}, {"shard_size": 1000, "shards": 1}),
            ({"norm_constraint": "False"}, {"clamp": None}),
            ({"edit_lr": "1e-3"}, {"lr": 0.001}),
            ({"n_iter": "70.0"}, {"max_steps": 70}),
            ({"batch_size": 4}, {"batch_size": 4}),
            ({"densities": "[0.3, 0.3]"}, {"density": 0.3}),
            ({"inner_params": "[transformer.h.21.mlp.fc_out.weight]"}, {"layer": 21}),
            ({"inner_params": "model.layers[3].mlp.down_proj"}, {"layer": 3}),
        ],
    )
    def test_other_values(self, hparams, changes, expected):
        text = without(HPARAMS, "- model") if "inner_params" in changes else HPARAMS
        config, _ = config_from_yaml(hparams(text, **changes))
        assert config.to_dict().items() >= expected.items()

    @pytest.mark.parametrize(
        "changes, note",
        [
            ({"replay": "True"}, "replay True is not used"),
            ({"use_chat_template": "True"}, "chat template"),
            ({"max_length": 30}, "max_length 30 is not used"),
            ({"retrieve": "True"}, "merge_freq 1000 is not used"),
            ({"weights": 0.5}, "weights 0.5 is not used"),
            ({"inner_params": "['transformer.h[8].mlp.c_fc.weight']"}, "value projection"),
            ({"inner_params": "['transformer.h[8].attn.c_proj.weight']"}, "value projection"),
        ],
    )
    def test_what_has_no_counterpart_is_said(self, hparams, changes, note):
        text = without(HPARAMS, "- model") if "inner_params" in changes else HPARAMS
        notes = config_from_yaml(hparams(text, **changes))[1]
        assert sum(note in text for text in notes) == 1

    @pytest.mark.parametrize(
        "changes, said",
        [
            ({"alg_name": "ROME"}, "alg_name is 'ROME', expected 'WISE'"),
            ({"edit_rl": 1}, "unknown setting 'edit_rl' .did you mean 'edit_lr'"),
            ({"mask_ratio": 2}, "mask_ratio is 2"),
            ({"mask_ratio": "lots"}, "mask_ratio is 'lots', expected a number"),
            ({"edit_lr": "True"}, "edit_lr is True, expected a number"),
            ({"edit_lr": ".nan"}, "edit_lr is nan"),
            ({"n_iter": 1.5}, "max_steps is 1.5"),
            ({"act_margin": "[1, 2]"}, "three numbers"),
            ({"act_margin": "[1, 2, x]"}, "act_margin is 'x', expected a number"),
            ({"merge_freq": 750}, "expected a multiple of save_freq, which is 500"),
            ({"save_freq": 0}, "save_freq is 0"),
            ({"merge_alg": "slerp"}, "merge_alg is 'slerp', expected 'ties'"),
            ({"objective_optimization": "prompt_last"}, "expected 'only_label'"),
            ({"inner_params": "[]"}, "a list of one"),
            ({"inner_params": "[model.norm.weight]"}, "no layer number"),
            ({"densities": "[0.3, 0.4]"}, "expected one number"),
            ({"retrieve": 1}, "retrieve is 1, expected true or false"),
            ({"save_freq": None, "merge_freq": None}, "save_freq and merge_freq are missing"),
        ],
    )
    def test_what_cannot_be_done_is_an_error(self, hparams, changes, said):
        text = without(HPARAMS, "- model") if "inner_params" in changes else HPARAMS
        with pytest.raises(ConfigError, match=said) as caught:
            config_from_yaml(hparams(text, **changes))
        assert "WISE.yaml" in str(caught.value)

    @pytest.mark.parametrize("text", ["a: [", "- 1", "", "just text"])
    def test_no_mapping(self, tmp_path, text):
        file = tmp_path / "x.yaml"
        file.write_text(text)
        with pytest.raises(ConfigError, match="x.yaml"):
            config_from_yaml(file)
        with pytest.raises(ConfigError, match="cannot be read"):
            config_from_yaml(tmp_path / "none.yaml")


class TestCommandLine:
    def test_recognised_by_its_name_and_overridden(self, hparams, caplog):
        config = build_config(hparams(), ["max_steps=7"], layer=3)
        assert config == config_from_yaml(hparams())[0].replace(max_steps=7, layer=3)
        assert "model_name" in caplog.text and "device" in caplog.text

    def test_its_json_too(self, tmp_path):
        file = tmp_path / "wise.json"
        file.write_text(json.dumps({"alg_name": "WISE", "save_freq": 5, "n_iter": 9}))
        assert build_config(file, []) == WiseConfig.paper(mode="merge", shard_size=5, max_steps=9)

    def test_our_own_settings_as_yaml(self, tmp_path):
        file = tmp_path / "ours.yml"
        file.write_text("max_steps: 5\nlr: 2.0\nlayout: element\n")
        assert build_config(file, ["lr=1"]) == WiseConfig(max_steps=5, lr=1, layout="element")

    def test_errors_name_the_option(self, hparams):
        with pytest.raises(ConfigError, match="--config .*WISE.yaml: alg_name is 'GRACE'"):
            build_config(hparams(alg_name="GRACE"), [])


class TestRequests:
    def test_columns(self):
        made = requests(
            prompts=["Who leads Fro?", "Capital of Zed:"],
            target_new=["Ann", "Bo"],
            ground_truth=["Al", ["Ed", "Eddy"]],
            rephrase_prompts=["Fro is led by", None],
            subject=["Fro", "Zed"],
            locality_inputs={
                "neighborhood": {"prompt": ["What do cows eat?", None], "ground_truth": ["grass", None]},
                "far": {"prompt": [["a b", "c d"], "e f"], "ground_truth": [["1", "2"], "3"]},
            },
            portability_inputs={"one_hop": {"prompt": ["x", "y"], "ground_truth": ["1", "2"]}},
            loc_prompts=["the sea is wide", "rain"],
            ood_rephrase=[None, "Zed is a land. Bo is its capital."],
        )
        assert made == [
            Edit(
                "Who leads Fro?",
                "Ann",
                subject="Fro",
                rephrases=("Fro is led by",),
                locality=(Locality("What do cows eat?", "grass"), Locality("a b", "1"), Locality("c d", "2")),
                irrelevant="the sea is wide",
                truth="Al",
            ),
            Edit(
                "Capital of Zed:",
                "Bo",
                subject="Zed",
                ood_prompts=("Zed is a land. Bo is its capital.",),
                locality=(Locality("e f", "3"),),
                irrelevant="rain",
                truth="Ed",
            ),
        ]

    def test_the_same_as_its_request_list(self):
        rows = [
            {
                "prompt": f"p{i}",
                "target_new": f"t{i}",
                "ground_truth": "<|endoftext|>",
                "portability": {},
                "locality": {"n": {"prompt": f"l{i}", "ground_truth": f"a{i}"}},
                "subject": "p",
                "loc_prompt": f"x{i}",
                "rephrase_prompt": f"r{i}",
            }
            for i in range(3)
        ]
        made = requests(
            [r["prompt"] for r in rows],
            [r["target_new"] for r in rows],
            rephrase_prompts=[r["rephrase_prompt"] for r in rows],
            subject=["p"] * 3,
            loc_prompts=[r["loc_prompt"] for r in rows],
            locality_inputs={"n": {"prompt": ["l0", "l1", "l2"], "ground_truth": ["a0", "a1", "a2"]}},
        )
        assert made == as_edits(rows) and made[0].truth is None

    def test_single_texts_and_nothing(self):
        assert requests("Who?", "Ann", rephrase_prompts="Who is it?") == [
            Edit("Who?", "Ann", rephrases=("Who is it?",))
        ]
        place = {"n": {"prompt": "far", "ground_truth": "off"}}
        assert requests("Who?", "Ann", locality_inputs=place)[0].locality == (Locality("far", "off"),)
        assert requests([], []) == []

    def test_few_irrelevant_texts_are_used_over_again(self):
        made = requests(["a", "b", "c"], ["1", "2", "3"], loc_prompts=["x", "y"])
        assert [edit.irrelevant for edit in made] == ["x", "y", "x"]
        assert {edit.irrelevant for edit in requests(["a", "b"], ["1", "2"], loc_prompts="x")} == {"x"}

    @pytest.mark.parametrize(
        "columns, said",
        [
            ({"target_new": ["1"]}, "target_new: has 1 entries, expected 2"),
            ({"subject": ["a", "b", "c"]}, "subject: has 3"),
            ({"rephrase_prompts": "one"}, "rephrase_prompts: has 1"),
            (
                {"locality_inputs": {"n": {"prompt": ["x"], "ground_truth": ["y"]}}},
                r"locality_inputs\['n'\]\['prompt'\]",
            ),
            ({"locality_inputs": {"n": ["x", "y"]}}, r"locality_inputs\['n'\]: expected"),
            ({"prompts": None}, "prompts: expected a list"),
            ({"loc_prompts": 5}, "loc_prompts: expected a list"),
            ({"target_new": ["1", " "]}, "edit 2: field 'target_new'"),
        ],
    )
    def test_bad_columns(self, columns, said):
        with pytest.raises(EditDataError, match=said):
            requests(**({"prompts": ["a", "b"], "target_new": ["1", "2"]} | columns))
