// node-postgres: its own protocol code in JavaScript, with cursors, streams and COPY.
//
// A line of JSON for each behaviour, as common.py says.

'use strict';

const crypto = require('node:crypto');
const fs = require('node:fs');
const { Readable, Writable } = require('node:stream');
const { pipeline } = require('node:stream/promises');
const { setTimeout: sleep } = require('node:timers/promises');
const pg = require('pg');
const Cursor = require('pg-cursor');
const QueryStream = require('pg-query-stream');
const copyStreams = require('pg-copy-streams');

const env = process.env;
const tlsRoot = env.DRIVER_TLS_ROOT;

const behaviours = {};

async function connect(options = {}) {
    const client = new pg.Client({
        host: env.DRIVER_HOST,
        port: Number(env.DRIVER_PORT),
        user: env.DRIVER_USER,
        password: env.DRIVER_PASSWORD,
        database: env.DRIVER_DBNAME,
        ...options,
    });
    // An error with no query to belong to must not end this process.
    client.on('error', () => {});
    await client.connect();
    return client;
}

async function connected(body, options) {
    const client = await connect(options);
    try {
        return await body(client);
    } finally {
        await client.end().catch(() => {});
    }
}

function diagnosis(error) {
    if (!error.severity) {
        return { class: error.constructor.name, code: error.code, text: error.message };
    }
    const fields = ['severity', 'code', 'message', 'detail', 'hint', 'position', 'internalPosition', 'internalQuery', 'where',
        'schema', 'table', 'column', 'dataType', 'constraint', 'file', 'line', 'routine'];
    return Object.fromEntries(fields.filter((name) => error[name] !== undefined).map((name) => [name, error[name]]));
}

async function fails(promise) {
    try {
        await promise;
        return 'did not fail';
    } catch (error) {
        return diagnosis(error);
    }
}

// Whoever refuses a connection need not do so in the same line of C.
async function refused(options) {
    const { file, line, routine, ...rest } = await fails(connect(options).then((client) => client.end()));
    return rest;
}

const shape = (result) => ({
    command: result.command,
    count: result.rowCount,
    columns: result.fields.map((f) => [f.name, f.dataTypeID, f.dataTypeSize, f.dataTypeModifier, f.format]),
    rows: result.rows,
});

behaviours.startup_parameters = async () => {
    const reported = {};
    const client = new pg.Client({
        host: env.DRIVER_HOST, port: Number(env.DRIVER_PORT), user: env.DRIVER_USER, password: env.DRIVER_PASSWORD,
        database: env.DRIVER_DBNAME, application_name: 'node shop', options: '-c work_mem=6MB', client_encoding: 'UTF8',
    });
    client.connection.on('parameterStatus', ({ parameterName, parameterValue }) => { reported[parameterName] = parameterValue; });
    await client.connect();
    const { rows } = await client.query("SELECT pg_backend_pid() AS pid, current_setting('work_mem') AS work_mem");
    const own = rows[0].pid === client.processID;
    await client.query("SET TimeZone = 'Asia/Tokyo'");
    await client.end();
    return [Object.entries(reported).sort(), own, rows[0].work_mem];
};

behaviours.refused_connections = async () => [
    await refused({ password: 'wrong' }),
    await refused({ user: 'no_such_role' }),
    await refused({ database: 'no_such_database' }),
    await refused({ options: '-c no_such_setting=1' }),
];

behaviours.simple_queries = () => connected(async (client) => {
    const many = await client.query("SELECT 1 AS a; SELECT 'x' AS b, NULL AS c; CREATE TEMP TABLE t (id int UNIQUE); INSERT INTO t VALUES (1), (2)");
    return [
        many.map(shape),
        shape(await client.query('')),
        await fails(client.query('SELECT 1; SELECT 1/0')),
        await fails(client.query('INSERT INTO t VALUES (3); INSERT INTO t VALUES (3)')),
        shape(await client.query('SELECT count(*) FROM t')),
        shape(await client.query({ text: 'SELECT 1, 2', rowMode: 'array' })),
    ];
});

behaviours.parameters_and_types = () => connected(async (client) => {
    const answers = [];
    for (const [type, value] of [['int4', 7], ['int8', '9007199254740993'], ['text', 'żółć 🐘'], ['bool', true], ['float8', 1.5], ['numeric', '1.10'],
        ['bytea', Buffer.from([0, 255])], ['timestamptz', '2024-02-29 12:00:00+00'], ['date', '2024-02-29'], ['json', { a: [1] }], ['jsonb', { b: null }],
        ['int4[]', [1, 2, null]], ['text[]', ['a"b', 'c,d']], ['uuid', '12345678-1234-5678-1234-567812345678'], ['interval', '1 day 2 hours'],
        ['point', '(1,2)'], ['text', null]]) {
        for (const binary of [false, true]) {
            const result = await client.query({ text: `SELECT $1::${type} AS v`, values: [value], binary }).then(shape, diagnosis);
            answers.push(result);
        }
    }
    answers.push(await fails(client.query('SELECT $1::int', ['x'])));
    answers.push(await fails(client.query('SELECT $1::int, $2::int', [1])));
    return answers;
});

behaviours.named_statements = () => connected(async (client) => {
    await client.query('CREATE TEMP TABLE t (id int PRIMARY KEY, name text)');
    const answers = [];
    for (let n = 0; n < 5; n++) {
        answers.push(shape(await client.query({ name: 'insert', text: 'INSERT INTO t VALUES ($1, $2) RETURNING *', values: [n, `n${n}`] })));
    }
    answers.push(await fails(client.query({ name: 'insert', text: 'INSERT INTO t VALUES ($1, $2) RETURNING *', values: [1, 'again'] })));
    answers.push(shape(await client.query({ name: 'insert', text: 'INSERT INTO t VALUES ($1, $2) RETURNING *', values: [9, 'after'] })));
    answers.push(shape(await client.query('SELECT name, statement FROM pg_prepared_statements')));
    // One name, two texts: the driver's own error. A malformed one: the server's.
    answers.push(await fails(client.query({ name: 'insert', text: 'SELECT 1' })));
    answers.push(await fails(client.query({ name: 'malformed', text: 'SELEC 1' })));
    await client.query('DEALLOCATE ALL');
    answers.push(await fails(client.query({ name: 'insert', text: 'INSERT INTO t VALUES ($1, $2) RETURNING *', values: [10, ''] })));
    return answers;
});

behaviours.queries_queued_together = () => connected(async (client) => {
    const settled = await Promise.allSettled([...Array(50).keys()].map((n) => client.query('SELECT 100 / ($1::int - 25) AS q', [n])));
    return settled.map((s) => (s.status === 'fulfilled' ? s.value.rows[0].q : s.reason.code));
});

behaviours.cursors_and_streams = () => connected(async (client) => {
    const cursor = client.query(new Cursor('SELECT n FROM generate_series(1, $1) n', [25]));
    const portions = [];
    for (;;) {
        const rows = await cursor.read(10);
        portions.push(rows.map((row) => row.n));
        if (rows.length === 0) break;
    }
    await cursor.close();
    // Closed long before its end: the portal is closed, and the session goes on.
    const left = client.query(new Cursor('SELECT generate_series(1, 1000000)'));
    const first = (await left.read(2)).length;
    await left.close();
    const failing = client.query(new Cursor('SELECT 10 / (4 - n) AS q FROM generate_series(1, 9) n'));
    const beforeFailure = await failing.read(2);
    const failure = await fails(failing.read(5));
    await failing.close().catch(() => {});
    let streamed = 0;
    for await (const row of client.query(new QueryStream('SELECT repeat(\'s\', 100) AS s FROM generate_series(1, 2000)', [], { batchSize: 77 }))) {
        streamed += row.s.length;
    }
    return [portions, first, beforeFailure, failure, streamed, (await client.query('SELECT 1 AS one')).rows];
});

behaviours.copy_both_ways = () => connected(async (client) => {
    await client.query('CREATE TEMP TABLE t (id int PRIMARY KEY, name text)');
    const copyIn = async (statement, chunks) => {
        const stream = client.query(copyStreams.from(statement));
        await pipeline(Readable.from(chunks), stream);
        return stream.rowCount;
    };
    const lines = [...Array(5000).keys()].map((n) => `${n}\tn${n}\n`);
    const answers = [await copyIn('COPY t FROM STDIN', lines)];
    answers.push(await fails(copyIn('COPY t FROM STDIN', ['1\tagain\n'])));
    answers.push(await fails(copyIn('COPY t FROM STDIN', ['x\tno number\n'])));
    answers.push(await fails(copyIn('COPY absent FROM STDIN', ['1\n'])));
    const hash = crypto.createHash('sha256');
    let length = 0;
    await pipeline(client.query(copyStreams.to('COPY (SELECT * FROM t ORDER BY id) TO STDOUT (FORMAT csv)')), new Writable({
        write(chunk, _, done) { hash.update(chunk); length += chunk.length; done(); },
    }));
    answers.push(length, hash.digest('hex'));
    // Broken off by the client.
    const broken = client.query(copyStreams.from('COPY t FROM STDIN'));
    broken.on('error', (error) => answers.push(diagnosis(error)));
    broken.write('7000\tseven\n');
    broken.destroy(new Error('the client changes its mind'));
    await new Promise((resolve) => { broken.on('close', resolve); });
    answers.push((await client.query('SELECT count(*) FROM t')).rows);
    return answers;
});

behaviours.transactions = () => connected(async (client) => {
    await client.query('CREATE TEMP TABLE t (id int PRIMARY KEY)');
    const seen = [];
    for (const statement of ['BEGIN', 'INSERT INTO t VALUES (1)', 'SAVEPOINT s', 'INSERT INTO t VALUES (1)', 'SELECT 1', 'ROLLBACK TO s',
        'INSERT INTO t VALUES (2)', 'COMMIT', 'BEGIN', 'SELECT 1/0', 'COMMIT', 'ROLLBACK', 'SELECT count(*) FROM t']) {
        seen.push([statement, await client.query(statement).then((r) => [r.command, r.rows], (e) => e.code)]);
    }
    return seen;
});

behaviours.notices_and_notifications = () => connected(async (client) => {
    const heard = [];
    client.on('notice', (notice) => heard.push(diagnosis(notice)));
    let last;
    const received = new Promise((resolve) => { last = resolve; });
    client.on('notification', (n) => {
        heard.push([n.channel, n.payload, n.processId === client.processID]);
        if (n.payload === 'last') last();
    });
    await client.query("DO $$ BEGIN RAISE NOTICE 'noted' USING DETAIL = 'd', HINT = 'h'; RAISE WARNING 'warned'; END $$");
    await client.query('LISTEN here');
    await client.query("NOTIFY here, 'own'");
    await connected((other) => other.query("SELECT pg_notify('here', 'żółć'), pg_notify('here', 'last')"));
    await received;
    return heard;
});

async function untilItSleeps(client) {
    await connected(async (other) => {
        const query = "SELECT state = 'active' AND query LIKE '%pg_sleep%' AS asleep FROM pg_stat_activity WHERE pid = $1";
        while (!(await other.query(query, [client.processID])).rows[0].asleep) await sleep(5);
    });
}

behaviours.cancel = () => connected(async (client) => {
    const query = new pg.Query('SELECT pg_sleep(60)');
    const ended = new Promise((resolve) => { query.callback = (error) => resolve(error ? diagnosis(error) : 'did not fail'); });
    client.query(query);
    await untilItSleeps(client);
    new pg.Client({ host: env.DRIVER_HOST, port: Number(env.DRIVER_PORT) }).cancel(client, query);
    return [await ended, (await client.query('SELECT 1 AS one')).rows];
});

behaviours.timeouts = () => connected(async (client) => {
    const answers = [await fails(client.query('SELECT pg_sleep(60)'))];
    return [answers, (await client.query('SHOW statement_timeout')).rows];
}, { statement_timeout: 30, lock_timeout: 1000, idle_in_transaction_session_timeout: 60000 });

behaviours.ended_by_the_server = () => connected(async (client) => {
    const ended = new Promise((resolve) => { client.once('end', resolve); });
    const error = fails(client.query('SELECT pg_terminate_backend(pg_backend_pid())'));
    const answers = [await error];
    await ended;
    answers.push(await fails(client.query('SELECT 1')));
    return answers;
});

behaviours.errors_in_full = () => connected(async (client) => {
    await client.query('CREATE TEMP TABLE t (id int PRIMARY KEY CHECK (id > 0), needed text NOT NULL)');
    await client.query("INSERT INTO t VALUES (1, '')");
    const answers = [];
    for (const statement of ['SELEC', "SELECT 'ż', absent", "INSERT INTO t VALUES (1, '')", "INSERT INTO t VALUES (-1, '')",
        'INSERT INTO t VALUES (2)', 'SELECT * FROM absent', "SELECT 'x'::int", 'SELECT 1/0', "SELECT format('%s')"]) {
        answers.push(await fails(client.query(statement)), await fails(client.query({ text: statement, values: [], queryMode: 'extended' })));
    }
    return answers;
});

behaviours.large_values = () => connected(async (client) => {
    const big = crypto.createHash('sha512').update('seed').digest().toString('hex').repeat(65536);
    const { rows } = await client.query('SELECT md5($1::text) AS there, $1::text AS back', [big]);
    const many = await client.query("SELECT repeat('m', 500) FROM generate_series(1, 20000)");
    return [big.length, rows[0].there === crypto.createHash('md5').update(big).digest('hex'), rows[0].back === big, many.rowCount];
});

behaviours.a_pool = async () => {
    const pool = new pg.Pool({
        host: env.DRIVER_HOST, port: Number(env.DRIVER_PORT), user: env.DRIVER_USER, password: env.DRIVER_PASSWORD,
        database: env.DRIVER_DBNAME, max: 8,
    });
    const results = await Promise.all([...Array(100).keys()].map((n) => pool.query('SELECT $1::int * 2 AS d', [n])));
    await pool.end();
    return results.map((result) => result.rows[0].d);
};

behaviours.tls_connections = async () => {
    const ca = fs.readFileSync(tlsRoot);
    const answers = [];
    for (const [host, ssl] of [['localhost', { ca }], ['127.0.0.1', { ca }], ['localhost', true], ['localhost', { rejectUnauthorized: false }], ['localhost', false]]) {
        answers.push(await connected(async (client) => [
            Boolean(client.connection.stream.encrypted), (await client.query("SELECT repeat('t', 200000) AS t")).rows[0].t.length,
        ], { host, ssl }).catch(diagnosis));
    }
    return answers;
};

// JSON without what differs between two runs.
function canonical(text) {
    return text.replaceAll(new RegExp(`\\b${env.DRIVER_PORT}\\b`, 'g'), 'PORT').replaceAll(/\bpg_temp_\d+/g, 'pg_temp_N');
}

(async () => {
    for (const [name, run] of Object.entries(behaviours)) {
        if (name.startsWith('tls_') !== Boolean(tlsRoot) || (env.DRIVER_ONLY && !name.includes(env.DRIVER_ONLY))) continue;
        let line;
        try {
            line = { name, result: await run() };
        } catch (error) {
            line = { name, unexpected: String(error.stack) };
        }
        fs.writeSync(1, `${canonical(JSON.stringify(line))}\n`);
    }
    process.exit(0);
})();
