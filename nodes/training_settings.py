from comfy_api.latest import io

from .sockets import CATEGORY, RARE_FIELDS, SettingsSocket, widget


class TrainingSettings(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TI_TrainingSettings",
            display_name="Training Settings (Textual Inversion)",
            category=CATEGORY,
            description="Settings of Train Textual Inversion that rarely need to be changed.",
            search_aliases=[
                "training settings",
                "optimizer settings",
                "learning rate schedule",
                "weight decay",
            ],
            inputs=[widget(name) for name in RARE_FIELDS],
            outputs=[
                SettingsSocket.Output(
                    display_name="settings", tooltip="Connect to 'settings' of Train Textual Inversion."
                )
            ],
        )

    @classmethod
    def execute(cls, **settings) -> io.NodeOutput:
        return io.NodeOutput(settings)
