// pg-boss: https://timgit.github.io/pg-boss

import { QUEUE, handled, load, main } from "./role.mjs";

const { PgBoss } = await load("pg-boss");

await main((connectionString, settings, queues) => {
  const boss = new PgBoss({ connectionString, ...settings.boss });
  boss.on("error", (error) => console.error(error));
  const work = settings.work ?? {};
  const perJob = (job) => ({ id: job.id, status: "completed", output: { sent: handled(job.data.sent) } });
  const handler = async (jobs) => {
    if (work.perJobResults) return jobs.map(perJob);
    const outputs = jobs.map((job) => ({ sent: handled(job.data.sent) }));
    return outputs.length === 1 ? outputs[0] : undefined; // a batch has no outputs of its jobs
  };
  return {
    install: async () => {
      await boss.start();
      for (const queue of queues) await boss.createQueue(queue, settings.queue);
    },
    open: () => boss.start(),
    send: (sent) => boss.send(QUEUE, { sent }),
    sendMany: (data) => boss.insert(QUEUE, data.map((sent) => ({ data: { sent } }))),
    start: async () => {
      await boss.start();
      for (const queue of queues) await boss.work(queue, work, handler);
    },
  };
});
