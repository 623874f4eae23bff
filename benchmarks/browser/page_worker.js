// A page's own worker that uses packages: the functions of page.js by message.

import * as functions from "./page.js";

onmessage = async ({ data: { name, argument } }) => postMessage(await functions[name](argument));
postMessage("ready");
