// graphile-worker: https://worker.graphile.org

import { QUEUE, handled, load, main } from "./role.mjs";

const { Logger, makeWorkerUtils, run } = await load("graphile-worker");

await main((connectionString, settings, queues) => {
  const options = { connectionString, logger: new Logger(() => () => {}) }; // it logs every job
  const task = async ({ sent }) => {
    handled(sent); // whatever a task returns is not kept
  };
  let utils;
  return {
    install: async () => (await makeWorkerUtils(options)).migrate(),
    open: async () => {
      utils = await makeWorkerUtils({ ...options, ...settings.utils });
    },
    send: (sent) => utils.addJob(QUEUE, { sent }),
    sendMany: (data) => utils.addJobs(data.map((sent) => ({ identifier: QUEUE, payload: { sent } }))),
    start: () =>
      run({
        logger: options.logger,
        noHandleSignals: true,
        preset: { worker: { connectionString, ...settings.worker } },
        taskList: Object.fromEntries(queues.map((queue) => [queue, task])),
      }),
  };
});
