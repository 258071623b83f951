// Adds ComfyUI's own text preview, which it only uses for PreviewAny and SaveText, to our nodes with text output.
import { app } from "../../scripts/app.js";

const NODES = ["TI_InspectEmbedding", "TI_SaveEmbedding"];

app.registerExtension({
  name: "textualinversion.ShowText",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!NODES.includes(nodeData.name)) return;
    const { addTextPreviewWidgets, updateTextPreviewWidgets } = window.comfyAPI.textPreviewWidgets;
    const { onNodeCreated, onExecuted } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function (...args) {
      onNodeCreated?.apply(this, args);
      addTextPreviewWidgets(this);
    };
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.call(this, output);
      updateTextPreviewWidgets(this, output);
    };
  },
});
