// Adds ComfyUI's own text preview, which it only uses for PreviewAny and SaveText, to our nodes with text output.
import { app } from "../../scripts/app.js";

const ALWAYS = ["TI_InspectEmbedding", "TI_SaveEmbedding"];
const IF_ANY = ["TI_ApplyEmbedding"]; // which mostly has nothing to say

app.registerExtension({
  name: "textualinversion.ShowText",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (![...ALWAYS, ...IF_ANY].includes(nodeData.name)) return;
    const { addTextPreviewWidgets, updateTextPreviewWidgets } = window.comfyAPI.textPreviewWidgets;
    const { onNodeCreated, onExecuted } = nodeType.prototype;
    nodeType.prototype.onNodeCreated = function (...args) {
      onNodeCreated?.apply(this, args);
      if (ALWAYS.includes(nodeData.name)) addTextPreviewWidgets(this);
    };
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.call(this, output);
      const isThere = this.widgets.some((widget) => widget.name === "preview_text");
      const says = output.text?.some(Boolean);
      if (says && !isThere) addTextPreviewWidgets(this);
      if (says || isThere) updateTextPreviewWidgets(this, output);
    };
  },
});
