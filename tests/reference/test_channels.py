"""The reference's channel files: what calibration writes, and what the reader takes and refuses."""

import json
from pathlib import Path

import pytest
import torch

from twilight_tilelang.reference import CalibrationBlock, calibrate_channels, load_channels
from twilight_tilelang.reference.channels import interleaved_channels

NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 4, 2, 8
ROOT = Path(__file__).resolve().parents[2]
SMOLLM2 = ROOT / "examples" / "channels" / "SmolLM2-135M-Instruct.json"
SIZES = (NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM)


def block(layer: int, seed: int, tokens: int = 20) -> CalibrationBlock:
    generator = torch.Generator().manual_seed(seed)
    heads = (NUM_QO_HEADS, NUM_KV_HEADS, NUM_QO_HEADS, NUM_KV_HEADS)
    parts = [torch.randn(tokens, n, HEAD_DIM, generator=generator) for n in heads]
    return CalibrationBlock(layer, *parts)


def published(path: Path, kinds: tuple[str, ...] = ("q", "k", "qk"), **lists: object) -> Path:
    """A file of layers 0 and 2 in the published form; `lists` replaces those of a kind."""
    generator = torch.Generator().manual_seed(5)
    content: dict[str, object] = {}
    for layer in (0, 2):
        for kind in kinds:
            count = NUM_KV_HEADS if kind == "k" else NUM_QO_HEADS
            rows = [torch.randperm(HEAD_DIM, generator=generator).tolist() for _ in range(count)]
            content[f"model.layers.{layer}.self_attn.{kind}_proj"] = lists.get(kind, rows)
        content[f"model.layers.{layer}.mlp.down_proj"] = [[3, 3]]  # some files have it; not read
    path.write_text(json.dumps(content))
    return path


def weight(block: CalibrationBlock, kind: str, head: int, channel: int) -> float:
    """Number by number: the mean over the block's tokens."""
    kv_head = head * NUM_KV_HEADS // NUM_QO_HEADS
    total = 0.0
    for token in range(len(block.q)):
        if kind == "qk":
            value = block.q[token, head, channel].double() * block.k[token, kv_head, channel]
        else:
            value = (block.q_proj if kind == "q" else block.k_proj)[token, head, channel]
        total += abs(float(value))
    return total / len(block.q)


def test_calibrate_channels_sums_the_means_of_all_blocks():
    # Blocks of different lengths: a sum over all tokens would weigh them otherwise. The last one is
    # faint: whoever keeps only it has other orders.
    blocks = [block(1, 0, 30), block(0, 1), block(1, 2, 4)]
    blocks[2] = CalibrationBlock(1, *(0.3 * part for part in blocks[2][1:]))
    lists = calibrate_channels(iter(blocks))
    assert [key.split(".")[2] for key in lists] == ["0"] * 3 + ["1"] * 3
    for layer in (0, 1):
        for kind in ("q", "k", "qk"):
            rows = lists[f"model.layers.{layer}.self_attn.{kind}_proj"]
            assert len(rows) == (NUM_KV_HEADS if kind == "k" else NUM_QO_HEADS)
            for head, row in enumerate(rows):
                weights = [
                    sum(weight(b, kind, head, channel) for b in blocks if b.layer == layer)
                    for channel in range(HEAD_DIM)
                ]
                assert row == sorted(range(HEAD_DIM), key=lambda c, w=weights: -w[c])


def test_calibrate_channels_puts_the_lower_channel_first_on_ties():
    ones = CalibrationBlock(0, *(torch.ones(3, n, HEAD_DIM) for n in (2, 1, 2, 1)))
    for rows in calibrate_channels([ones]).values():
        assert all(row == list(range(HEAD_DIM)) for row in rows)


def test_calibrate_channels_sorts_layers_by_number():
    lists = calibrate_channels([block(10, 0), block(9, 1)])
    assert [int(key.split(".")[2]) for key in lists] == [9, 9, 9, 10, 10, 10]


def test_calibrate_channels_rejects_bad_blocks():
    good = block(0, 0)
    with pytest.raises(ValueError, match="blocks: expected at least one, got none"):
        calibrate_channels([])
    with pytest.raises(ValueError, match=r"q: expected shape \[20, 4, 8\], got \[19, 4, 8\]"):
        calibrate_channels([good._replace(q=good.q[1:])])
    with pytest.raises(ValueError, match="num_qo_heads a multiple of num_kv_heads, got"):
        calibrate_channels([CalibrationBlock(0, *(torch.ones(3, n, 8) for n in (3, 2, 3, 2)))])
    other = CalibrationBlock(0, *(torch.ones(3, n, 8) for n in (2, 1, 2, 1)))
    with pytest.raises(ValueError, match=r"0.self_attn.q_proj: expected \[4, 8\] weights, got"):
        calibrate_channels([good, other])
    good.k[3, 1, 2] = float("nan")
    with pytest.raises(ValueError, match="qk_proj: expected finite queries and keys"):
        calibrate_channels([good])


def test_load_channels_takes_the_first_r_of_what_calibration_wrote(tmp_path):
    lists = calibrate_channels([block(0, 0), block(3, 1)])
    path = tmp_path / "channels.json"
    path.write_text(json.dumps(lists))
    for kind in ("q", "k", "qk"):
        rows = lists[f"model.layers.3.self_attn.{kind}_proj"]
        if kind == "k":
            rows = [rows[head * NUM_KV_HEADS // NUM_QO_HEADS] for head in range(NUM_QO_HEADS)]
        for name in (kind, f"{kind}_proj"):
            channels = load_channels(path, 3, name, *SIZES, r=3)
            assert channels.dtype == torch.int32 and channels.is_contiguous()
            assert channels.tolist() == [row[:3] for row in rows]


def test_load_channels_reads_multi_head_and_grouped_files(tmp_path):
    path = published(tmp_path / "gqa.json")
    content = json.loads(path.read_text())
    grouped = load_channels(str(path), 2, "k", *SIZES, r=HEAD_DIM)
    rows = content["model.layers.2.self_attn.k_proj"]
    assert grouped.tolist() == [rows[0], rows[0], rows[1], rows[1]]
    alone = load_channels(path, 2, "k", NUM_KV_HEADS, NUM_KV_HEADS, HEAD_DIM, r=1)
    assert alone.tolist() == [row[:1] for row in rows]


def test_load_channels_refuses_damaged_files(tmp_path):
    def refuses(message: str, path: Path, layer: int = 0, kind: str = "q", r: int = 3) -> None:
        with pytest.raises(ValueError, match=message) as caught:
            load_channels(path, layer, kind, *SIZES, r=r)
        assert str(caught.value).startswith(str(path))

    rows = [list(range(HEAD_DIM))] * NUM_QO_HEADS
    path = published(tmp_path / "a.json")
    refuses(r"expected the key model.layers.1.self_attn.q_proj, got 2 others of q_proj", path, 1)
    path = published(tmp_path / "b.json", kinds=("q", "qk"))
    refuses(r"expected the key model.layers.0.self_attn.k_proj, got 0 others", path, kind="k")
    path = published(tmp_path / "c.json", q=rows[:3])
    refuses(r"model.layers.0.self_attn.q_proj: expected 4 lists, got 3", path)
    path = published(tmp_path / "d.json", k=rows)  # a list for each query head
    refuses(r"model.layers.0.self_attn.k_proj: expected 2 lists, got 4", path, kind="k")
    path = published(tmp_path / "e.json", q={"0": rows})
    refuses("q_proj: expected 4 lists, got dict", path)
    order = r"q_proj: expected an order of the channels 0\.\.7 for every head, got "
    for name, row, found in [
        ("short", [0, 1, 2], r"3 numbers, 3 distinct, 0\.\.2"),
        ("twice", [0, 1, 2, 3, 4, 5, 6, 6], r"8 numbers, 7 distinct, 0\.\.6"),
        ("beyond", [1, 2, 3, 4, 5, 6, 7, 8], r"8 numbers, 8 distinct, 1\.\.8"),
        ("float", [0, 1, 2, 3, 4, 5, 6, 7.0], r"7\.0 among them"),
        ("bool", [0, True, 2, 3, 4, 5, 6, 7], "True among them"),
        ("text", "01234567", "str"),
    ]:
        path = published(tmp_path / f"{name}.json", q=[*rows[:2], row, rows[3]])
        refuses(order + found + r" \(head 2\)", path)
    path = tmp_path / "list.json"
    path.write_text("[]")
    refuses("expected a JSON object, got list", path)
    path = tmp_path / "cut.json"
    path.write_text('{"model.layers.0')
    refuses("expected JSON, got Unterminated string", path)


@pytest.mark.parametrize(("kind", "number"), [("q", 9), ("k", 3), ("qk", 9)])
def test_the_committed_file_orders_every_channel_of_every_layer(kind, number):
    for layer in range(30):
        channels = load_channels(SMOLLM2, layer, kind, 9, 3, 64, r=64)
        assert channels.shape == (9, 64)
        assert (channels.sort(dim=1).values == torch.arange(64)).all()
        assert len({tuple(row) for row in channels.tolist()}) == number
    with pytest.raises(ValueError, match=r"model\.layers\.30\."):
        load_channels(SMOLLM2, 30, kind, 9, 3, 64, r=64)


def test_load_channels_rejects_bad_arguments(tmp_path):
    path = published(tmp_path / "channels.json")
    for r in (0, HEAD_DIM + 1, 2.0):
        with pytest.raises(ValueError, match=r"r: expected an int in 1..8 \(head_dim\), got "):
            load_channels(path, 0, "q", *SIZES, r=r)
    with pytest.raises(ValueError, match="kind: expected 'q', 'k' or 'qk', got 'v'"):
        load_channels(path, 0, "v_proj", *SIZES, r=3)
    with pytest.raises(ValueError, match="num_qo_heads: expected a multiple of 2"):
        load_channels(path, 0, "q", 3, 2, HEAD_DIM, r=3)


def test_interleaved_channels_follow_the_pairs_of_rope():
    half = torch.arange(HEAD_DIM, dtype=torch.int32).view(2, -1).T  # rows: pairs (c, c + 4)
    assert interleaved_channels(half, HEAD_DIM).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
