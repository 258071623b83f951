"""The real ComfyUI starts with this pack in it and runs a graph."""

from __future__ import annotations

from pathlib import Path

import pytest
from comfyui_server import ComfyError, ComfyServer
from ti_pack.textual_inversion.config import TrainConfig

EMPTY_PICTURE = {
    "1": {
        "class_type": "EmptyImage",
        "inputs": {"width": 8, "height": 8, "batch_size": 1, "color": 255},
    },
    "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "smoke"}},
}


def test_it_lists_the_nodes_of_core_and_of_this_pack(server: ComfyServer) -> None:
    nodes = server.object_info()
    assert "KSampler" in nodes
    assert any(name.startswith("TI_") for name in nodes)


def test_a_graph_runs_to_a_file(server: ComfyServer) -> None:
    run = server.run(EMPTY_PICTURE)
    (picture,) = run.history["outputs"]["2"]["images"]
    assert (Path(server.base) / "output" / picture["filename"]).is_file()
    assert "execution_success" in [event["type"] for event in run.events]


def test_a_refused_graph_says_why(server: ComfyServer) -> None:
    with pytest.raises(ComfyError, match="no_such_node"):
        server.run({"1": {"class_type": "no_such_node", "inputs": {}}})


def test_comfyui_in_this_process_stays_on_the_cpu() -> None:
    import comfy.model_management
    import folder_paths

    import nodes

    assert comfy.model_management.get_torch_device().type == "cpu"
    assert "KSampler" in nodes.NODE_CLASS_MAPPINGS  # ComfyUI's `nodes`, not this pack's
    assert "comfyui-tests-" in folder_paths.get_folder_paths("embeddings")[0]
    assert TrainConfig.__module__ == "ti_pack.textual_inversion.config"
