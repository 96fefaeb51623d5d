// A bundle's golden.json through an engine. What comes out is compared by Stillgraph's Python.

// For each case {name, tokens, finish_reason, logits (as listed), ttft_ms, tpot_ms}. decode(base64): of a PNG, as RGBA.
export async function* answers(engine, golden, decode) {
  if (golden.format_version !== 1) throw new Error(`golden.json has format version ${golden.format_version} and this driver understands 1.`);
  for (const each of golden.cases) {
    yield await answer(engine, each, each.picture_png ? [await decode(each.picture_png)] : []);
  }
}

async function answer(engine, { name, prompt, max_new_tokens: maxNewTokens, logits: listed }, pictures) {
  const wanted = new Map(listed.map(({ step, ids }) => [step, ids])), tokens = [], logits = [];
  let first, last;
  engine.graphs.reset(); // no case may profit from the cache of another
  for await (const step of engine.stream(prompt, { maxNewTokens, pictures })) {
    const ids = wanted.get(tokens.length);
    if (ids) logits.push({ step: tokens.length, ids, values: ids.map((id) => step.logits[id]) });
    tokens.push(step.token);
    first ??= step;
    last = step;
  }
  const tpot = tokens.length > 1 ? (last.elapsed - first.elapsed) / (tokens.length - 1) : null;
  return { name, tokens, finish_reason: last.finishReason, logits, ttft_ms: first.elapsed, tpot_ms: tpot };
}
