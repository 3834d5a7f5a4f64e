// llama.cpp as a side of the decoding benchmark, through node-llama-cpp 3.
//
//     node llama_cpp.mjs MODULE MODEL.gguf THREADS [flash]
//
// Reads one JSON object a line and answers with one. {"rows", "context", "tokens"}: so many sequences of so many tokens
// each go on by `tokens` more, together, greedily. {"prompt"}: these tokens are read, up to the first answer token.
// {"prompt", "history"}: the same behind tokens that are held. The answer is {"seconds"}, or {"failed"}.
// Greedy ids for the tests: {"greedy", "tokens"} is answered by {"ids"}.

import {createInterface} from "node:readline";
import {pathToFileURL} from "node:url";

const [, , module, modelPath, threadsText, flash] = process.argv;
const threads = Number(threadsText);
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(module).href);
const say = (message) => process.stdout.write(JSON.stringify(message) + "\n");
const now = () => ({wall: Number(process.hrtime.bigint()) / 1e9, used: process.cpuUsage()});

function since({wall, used}) {
    const {user, system} = process.cpuUsage(used);
    return {seconds: now().wall - wall, processor: (user + system) / 1e6};
}
const greedy = {temperature: 0, yieldEogToken: true};

const llama = await getLlama({
    gpu: false, build: "never", skipDownload: true, progressLogs: false, logLevel: LlamaLogLevel.error, maxThreads: threads,
});
const model = await llama.loadModel({modelPath, gpuLayers: 0});
const contexts = new Map();

// Sequences of one context for each number of them and room.
async function sequencesOf(rows, room) {
    const key = `${rows} ${room}`;
    if (!contexts.has(key)) {
        const context = await model.createContext({
            sequences: rows, contextSize: room, batchSize: 512, threads: {ideal: threads, min: threads},
            flashAttention: flash === "flash",
        });
        contexts.set(key, Array.from({length: rows}, () => context.getSequence()));
    }
    return contexts.get(key);
}

const madeUp = (length, seed) => Array.from({length}, (_, i) => 1 + (i * 7919 + seed * 104729) % 250);

async function decode({rows, context, tokens}) {
    const sequences = await sequencesOf(rows, context + tokens + 8);
    const streams = await Promise.all(sequences.map(async (sequence, row) => {
        if (sequence.nextTokenIndex < context) {
            await sequence.evaluateWithoutGeneratingNewTokens(madeUp(context, row));
        } else {
            await sequence.eraseContextTokenRanges([{start: context, end: sequence.nextTokenIndex}]);
        }
        return sequence.evaluate([1 + row], greedy);
    }));
    await Promise.all(streams.map((stream) => stream.next()));
    const start = now();
    await Promise.all(streams.map(async (stream) => {
        for (let i = 0; i < tokens; ++i) await stream.next();
    }));
    const took = since(start);
    await Promise.all(streams.map((stream) => stream.return()));
    return took;
}

async function read({history = [], prompt, room}) {
    const [sequence] = await sequencesOf(1, room);
    if (sequence.nextTokenIndex !== history.length) {
        if (history.length && sequence.nextTokenIndex > history.length) {
            await sequence.eraseContextTokenRanges([{start: history.length, end: sequence.nextTokenIndex}]);
        } else {
            await sequence.clearHistory();
            if (history.length) await sequence.evaluateWithoutGeneratingNewTokens(history);
        }
    }
    const start = now();
    const stream = sequence.evaluate(prompt, greedy);
    await stream.next();
    const took = since(start);
    await stream.return();
    return took;
}

async function answer({greedy: prompt, tokens}) {
    const [sequence] = await sequencesOf(1, prompt.length + tokens + 8);
    await sequence.clearHistory();
    const ids = [];
    for await (const token of sequence.evaluate(prompt, greedy)) {
        ids.push(token);
        if (ids.length === tokens) break;
    }
    return {ids};
}

say({loaded: true});
for await (const line of createInterface({input: process.stdin})) {
    const asked = JSON.parse(line);
    try {
        say(await ("rows" in asked ? decode(asked) : "greedy" in asked ? answer(asked) : read(asked)));
    } catch (error) {
        say({failed: String(error)});
    }
}
process.exit(0);
