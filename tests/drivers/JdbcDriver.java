// JDBC (Debian's libpostgresql-jdbc-java): batches in one flight, fetch sizes through portals,
// server-side prepared statements, function calls for large objects, XA.
//
// A line of JSON for each behaviour, as common.py says. Run by `java -cp postgresql.jar JdbcDriver.java`.

import java.io.PrintWriter;
import java.io.StringReader;
import java.io.StringWriter;
import java.math.BigDecimal;
import java.nio.charset.StandardCharsets;
import java.security.MessageDigest;
import java.sql.*;
import java.time.LocalDate;
import java.time.LocalDateTime;
import java.time.OffsetDateTime;
import java.time.ZoneOffset;
import java.util.*;
import java.util.concurrent.CompletableFuture;
import javax.transaction.xa.XAException;
import javax.transaction.xa.XAResource;
import javax.transaction.xa.Xid;
import org.postgresql.PGConnection;
import org.postgresql.PGNotification;
import org.postgresql.PGStatement;
import org.postgresql.copy.CopyIn;
import org.postgresql.core.BaseConnection;
import org.postgresql.largeobject.LargeObject;
import org.postgresql.largeobject.LargeObjectManager;
import org.postgresql.util.PSQLException;
import org.postgresql.util.PSQLWarning;
import org.postgresql.util.ServerErrorMessage;
import org.postgresql.xa.PGXADataSource;

public class JdbcDriver {
    interface Body<T> { T run(Connection c) throws Exception; }

    interface Action { void run() throws Exception; }

    interface Behaviour { Object run() throws Exception; }

    static final Map<String, String> env = System.getenv();
    static final Map<String, Behaviour> behaviours = new LinkedHashMap<>();

    static Connection connect(String... options) throws SQLException {
        Properties properties = new Properties();
        properties.setProperty("user", env.get("DRIVER_USER"));
        properties.setProperty("password", env.get("DRIVER_PASSWORD"));
        properties.setProperty("sslmode", "disable");
        String database = env.get("DRIVER_DBNAME");
        String host = env.get("DRIVER_HOST");
        for (int n = 0; n < options.length; n += 2) {
            switch (options[n]) {
                case "database": database = options[n + 1]; break;
                case "host": host = options[n + 1]; break;
                default: properties.setProperty(options[n], options[n + 1]);
            }
        }
        return DriverManager.getConnection("jdbc:postgresql://" + host + ":" + env.get("DRIVER_PORT") + "/" + database, properties);
    }

    static <T> T connected(Body<T> body, String... options) throws Exception {
        try (Connection c = connect(options)) {
            return body.run(c);
        }
    }

    static Object diagnosis(Throwable thrown) {
        if (thrown instanceof XAException) {
            return list("XAException", ((XAException) thrown).errorCode, thrown.getMessage());
        }
        ServerErrorMessage m = thrown instanceof PSQLException ? ((PSQLException) thrown).getServerErrorMessage()
            : thrown instanceof PSQLWarning ? ((PSQLWarning) thrown).getServerErrorMessage() : null;
        if (m == null) {
            String state = thrown instanceof SQLException ? ((SQLException) thrown).getSQLState() : null;
            return list(thrown.getClass().getSimpleName(), state, thrown.getMessage());
        }
        return list(m.getSeverity(), m.getSQLState(), m.getMessage(), m.getDetail(), m.getHint(), m.getPosition(), m.getWhere(), m.getSchema(),
            m.getTable(), m.getColumn(), m.getDatatype(), m.getConstraint(), m.getFile(), m.getLine(), m.getRoutine(), m.getInternalPosition());
    }

    static Object fails(Action action) {
        try {
            action.run();
            return "did not fail";
        } catch (Exception e) {
            return diagnosis(e);
        }
    }

    // Whoever refuses a connection need not do so in the same line of C.
    static Object refused(String... options) {
        try {
            connect(options).close();
            return "was let in";
        } catch (SQLException e) {
            return list(e.getSQLState(), e.getMessage());
        }
    }

    static List<Object> list(Object... items) {
        return new ArrayList<>(Arrays.asList(items));
    }

    static List<Object> rows(ResultSet results) throws SQLException {
        List<Object> rows = list();
        int columns = results.getMetaData().getColumnCount();
        while (results.next()) {
            List<Object> row = list();
            for (int n = 1; n <= columns; n++) row.add(results.getString(n));
            rows.add(row);
        }
        return rows;
    }

    static List<Object> query(Connection c, String sql) throws SQLException {
        try (Statement s = c.createStatement()) {
            return rows(s.executeQuery(sql));
        }
    }

    static void execute(Connection c, String sql) throws SQLException {
        try (Statement s = c.createStatement()) {
            s.execute(sql);
        }
    }

    static List<Object> everyResult(Statement s, boolean isRows) throws SQLException {
        List<Object> all = list();
        while (true) {
            if (isRows) {
                all.add(rows(s.getResultSet()));
            } else {
                int count = s.getUpdateCount();
                if (count == -1) return all;
                all.add(count);
            }
            isRows = s.getMoreResults();
        }
    }

    static {
        behaviours.put("startup_parameters", () -> connected(c -> {
            PGConnection pg = c.unwrap(PGConnection.class);
            boolean own = query(c, "SELECT pg_backend_pid()").toString().equals("[[" + pg.getBackendPID() + "]]");
            execute(c, "SET TimeZone = 'Asia/Tokyo'");
            DatabaseMetaData m = c.getMetaData();
            return list(new TreeMap<>(pg.getParameterStatuses()), own, m.getDatabaseProductVersion(), m.getDatabaseMajorVersion(),
                query(c, "SHOW work_mem"), c.getCatalog(), c.getSchema());
        }, "ApplicationName", "jdbc shop", "options", "-c work_mem=6MB", "currentSchema", "public"));

        behaviours.put("refused_connections", () -> list(
            refused("password", "wrong"), refused("user", "no_such_role"), refused("database", "no_such_database"),
            refused("options", "-c no_such_setting=1")));

        behaviours.put("many_statements", () -> connected(c -> {
            Statement s = c.createStatement();
            List<Object> all = everyResult(s, s.execute("SELECT 1; CREATE TEMP TABLE t (id int UNIQUE); INSERT INTO t VALUES (1), (2); SELECT 'x', NULL; "));
            all.add(fails(() -> s.execute("INSERT INTO t VALUES (7); SELECT 1/0; INSERT INTO t VALUES (8)")));
            all.add(query(c, "SELECT count(*) FROM t"));
            return all;
        }));

        for (String mode : List.of("simple", "extended", "extendedForPrepared", "extendedCacheEverything")) {
            behaviours.put("query_mode_" + mode, () -> connected(c -> {
                List<Object> all = list();
                for (int n = 0; n < 8; n++) {
                    try (PreparedStatement p = c.prepareStatement("SELECT ?::int + 1, ?::text")) {
                        p.setInt(1, n);
                        p.setString(2, "a 'quoted' \\ żółć");
                        all.add(rows(p.executeQuery()));
                    }
                }
                all.add(fails(() -> query(c, "SELECT 1/0")));
                return all;
            }, "preferQueryMode", mode));
        }

        behaviours.put("server_side_prepared", () -> connected(c -> {
            execute(c, "CREATE TEMP TABLE t (id int PRIMARY KEY, name text)");
            List<Object> all = list();
            PreparedStatement p = c.prepareStatement("INSERT INTO t VALUES (?, ?)");
            for (int n = 0; n < 8; n++) {
                p.setInt(1, n);
                p.setString(2, "n" + n);
                all.add(list(p.executeUpdate(), p.unwrap(PGStatement.class).isUseServerPrepare()));
            }
            p.setInt(1, 3);
            all.add(fails(p::executeUpdate));
            PreparedStatement star = c.prepareStatement("SELECT * FROM t WHERE id = ?");
            star.setInt(1, 3);
            for (int n = 0; n < 6; n++) all.add(rows(star.executeQuery()));
            execute(c, "ALTER TABLE t ADD COLUMN extra int");
            all.add(rows(star.executeQuery()));
            execute(c, "DEALLOCATE ALL");
            all.add(rows(star.executeQuery()));
            ResultSetMetaData m = c.prepareStatement("SELECT id, name, 1.5::numeric(5,2) AS n FROM t").getMetaData();
            for (int n = 1; n <= 3; n++) all.add(list(m.getColumnName(n), m.getColumnTypeName(n), m.getPrecision(n), m.getScale(n), m.isNullable(n)));
            ParameterMetaData pm = p.getParameterMetaData();
            all.add(list(pm.getParameterCount(), pm.getParameterTypeName(1), pm.getParameterTypeName(2)));
            return all;
        }, "prepareThreshold", "3"));

        behaviours.put("types", () -> connected(c -> {
            List<Object> all = list();
            for (int round = 0; round < 3; round++) {
                PreparedStatement p = c.prepareStatement("SELECT ?::int2, ?::int8, ?::numeric, ?::float8, ?::bool, ?::text, ?::bytea, ?::date, "
                    + "?::timestamp, ?::timestamptz, ?::uuid, ?::int4[], ?::jsonb, ?::text");
                p.setShort(1, (short) -7);
                p.setLong(2, Long.MIN_VALUE);
                p.setBigDecimal(3, new BigDecimal("12345.678900"));
                p.setDouble(4, Double.NaN);
                p.setBoolean(5, true);
                p.setString(6, "żółć \uD83D\uDC18");
                p.setBytes(7, new byte[] {0, -1, 127});
                p.setObject(8, LocalDate.of(2024, 2, 29));
                p.setObject(9, LocalDateTime.of(2024, 2, 29, 12, 0, 0, 1000));
                p.setObject(10, OffsetDateTime.of(2024, 2, 29, 12, 0, 0, 0, ZoneOffset.UTC));
                p.setObject(11, UUID.fromString("12345678-1234-5678-1234-567812345678"));
                p.setArray(12, c.createArrayOf("int4", new Integer[] {1, null, 3}));
                p.setObject(13, "{\"a\": 1}", Types.OTHER);
                p.setNull(14, Types.VARCHAR);
                ResultSet r = p.executeQuery();
                r.next();
                for (int n = 1; n <= 14; n++) {
                    Object value = r.getObject(n);
                    all.add(value instanceof byte[] ? Arrays.toString((byte[]) value) : String.valueOf(value));
                }
            }
            return all;
        }, "prepareThreshold", "1"));

        behaviours.put("fetch_size", () -> connected(c -> {
            c.setAutoCommit(false);
            List<Object> all = list();
            PreparedStatement p = c.prepareStatement("SELECT n FROM generate_series(1, ?) n");
            p.setFetchSize(50);
            p.setInt(1, 1234);
            ResultSet r = p.executeQuery();
            int sum = 0;
            boolean between = true;
            while (r.next()) {
                sum += r.getInt(1);
                // Another statement while the portal is open.
                if (between) all.add(query(c, "SELECT 'between'"));
                between = false;
            }
            all.add(sum);
            p.setMaxRows(7);
            all.add(rows(p.executeQuery()));
            Statement s = c.createStatement();
            s.setFetchSize(2);
            ResultSet failing = s.executeQuery("SELECT 10 / (4 - n) FROM generate_series(1, 9) n");
            all.add(fails(() -> rows(failing)));
            c.rollback();
            ResultSet left = s.executeQuery("SELECT generate_series(1, 1000000)");
            left.next();
            left.close();
            all.add(query(c, "SELECT 1"));
            c.commit();
            return all;
        }));

        behaviours.put("batches", () -> connected(c -> {
            execute(c, "CREATE TEMP TABLE t (id int PRIMARY KEY, name text)");
            List<Object> all = list();
            PreparedStatement p = c.prepareStatement("INSERT INTO t VALUES (?, ?)");
            for (int n = 0; n < 1000; n++) {
                p.setInt(1, n);
                p.setString(2, "n".repeat(n % 300));
                p.addBatch();
            }
            all.add(Arrays.stream(p.executeBatch()).sum());
            for (int id : new int[] {2000, 2001, 1, 2002}) {
                p.setInt(1, id);
                p.setString(2, "");
                p.addBatch();
            }
            all.add(failsInBatch(p));
            all.add(query(c, "SELECT count(*) FROM t"));
            c.setAutoCommit(false);
            p.setInt(1, 3000);
            p.addBatch();
            p.setInt(1, 3000);
            p.addBatch();
            all.add(failsInBatch(p));
            all.add(fails(() -> query(c, "SELECT 1")));
            c.rollback();
            Statement s = c.createStatement();
            s.addBatch("INSERT INTO t VALUES (4000)");
            s.addBatch("UPDATE t SET name = 'u' WHERE id < 10");
            s.addBatch("DELETE FROM t WHERE id = 4000");
            all.add(Arrays.toString(s.executeBatch()));
            c.commit();
            PreparedStatement returning = c.prepareStatement("INSERT INTO t (id) VALUES (?)", Statement.RETURN_GENERATED_KEYS);
            for (int n = 5000; n < 5300; n++) {
                returning.setInt(1, n);
                returning.addBatch();
            }
            returning.executeBatch();
            all.add(rows(returning.getGeneratedKeys()).size());
            c.commit();
            return all;
        }));

        behaviours.put("batches_rewritten", () -> connected(c -> {
            execute(c, "CREATE TEMP TABLE t (id int, name text)");
            PreparedStatement p = c.prepareStatement("INSERT INTO t VALUES (?, ?)");
            for (int n = 0; n < 300; n++) {
                p.setInt(1, n);
                p.setString(2, "n" + n);
                p.addBatch();
            }
            return list(p.executeBatch().length, query(c, "SELECT count(*), sum(id) FROM t"));
        }, "reWriteBatchedInserts", "true"));

        behaviours.put("transactions", () -> connected(c -> {
            List<Object> all = list();
            execute(c, "CREATE TEMP TABLE t (id int PRIMARY KEY)");
            c.setAutoCommit(false);
            c.setTransactionIsolation(Connection.TRANSACTION_SERIALIZABLE);
            all.add(query(c, "SHOW transaction_isolation"));
            execute(c, "INSERT INTO t VALUES (1)");
            Savepoint before = c.setSavepoint("a savepoint");
            all.add(fails(() -> execute(c, "INSERT INTO t VALUES (1)")));
            all.add(fails(() -> query(c, "SELECT 1")));
            c.rollback(before);
            c.releaseSavepoint(before);
            c.commit();
            c.setReadOnly(true);
            all.add(fails(() -> execute(c, "CREATE TABLE never (a int)")));
            c.rollback();
            c.setReadOnly(false);
            all.add(query(c, "SELECT * FROM t"));
            c.rollback();
            all.add(fails(() -> { execute(c, "SELECT 1/0"); }));
            all.add(fails(c::commit));
            return all;
        }));

        behaviours.put("autosave", () -> connected(c -> {
            c.setAutoCommit(false);
            execute(c, "CREATE TEMP TABLE t (id int PRIMARY KEY)");
            execute(c, "INSERT INTO t VALUES (1)");
            List<Object> all = list(fails(() -> execute(c, "INSERT INTO t VALUES (1)")));
            execute(c, "INSERT INTO t VALUES (2)");
            c.commit();
            all.add(query(c, "SELECT * FROM t ORDER BY 1"));
            return all;
        }, "autosave", "always"));

        behaviours.put("copy", () -> connected(c -> {
            execute(c, "CREATE TEMP TABLE t (id int PRIMARY KEY, name text)");
            PGConnection pg = c.unwrap(PGConnection.class);
            List<Object> all = list(pg.getCopyAPI().copyIn("COPY t FROM STDIN", new StringReader("1\tone\n2\t\\N\n")));
            all.add(fails(() -> pg.getCopyAPI().copyIn("COPY t FROM STDIN", new StringReader("3\tx\nno number\ty\n"))));
            CopyIn broken = pg.getCopyAPI().copyIn("COPY t FROM STDIN (FORMAT csv)");
            broken.writeToCopy("9,nine\n".getBytes(StandardCharsets.UTF_8), 0, 7);
            broken.cancelCopy();
            StringWriter out = new StringWriter();
            all.add(pg.getCopyAPI().copyOut("COPY t TO STDOUT (FORMAT csv)", out));
            all.add(out.toString());
            all.add(fails(() -> pg.getCopyAPI().copyOut("COPY (SELECT 1/(3-n) FROM generate_series(1,5) n) TO STDOUT", new StringWriter())));
            all.add(query(c, "SELECT count(*) FROM t"));
            return all;
        }));

        behaviours.put("large_objects_by_function_calls", () -> connected(c -> {
            c.setAutoCommit(false);
            LargeObjectManager manager = c.unwrap(PGConnection.class).getLargeObjectAPI();
            long oid = manager.createLO();
            LargeObject object = manager.open(oid, LargeObjectManager.READWRITE);
            byte[] content = new byte[300_000];
            new Random(7).nextBytes(content);
            object.write(content);
            object.seek(1000);
            byte[] part = object.read(5000);
            List<Object> all = list(Arrays.equals(part, Arrays.copyOfRange(content, 1000, 6000)), object.tell64(), object.size64());
            object.truncate64(10);
            all.add(object.size64());
            object.close();
            c.commit();
            all.add(fails(() -> manager.open(1L)));
            c.rollback();
            manager.delete(oid);
            c.commit();
            return all;
        }));

        behaviours.put("functions_and_procedures", () -> connected(c -> {
            execute(c, "CREATE OR REPLACE FUNCTION pg_temp.added(a int, b int, OUT total int, OUT words text) AS $$ SELECT a + b, 'sum' $$ LANGUAGE sql");
            List<Object> all = list();
            try (CallableStatement s = c.prepareCall("{call pg_temp.added(?, ?, ?, ?)}")) {
                s.setInt(1, 3);
                s.setInt(2, 4);
                s.registerOutParameter(3, Types.INTEGER);
                s.registerOutParameter(4, Types.VARCHAR);
                s.execute();
                all.add(list(s.getInt(3), s.getString(4)));
            }
            c.setAutoCommit(false);
            execute(c, "CREATE FUNCTION pg_temp.pointed() RETURNS refcursor AS $$ DECLARE r refcursor := 'pointed'; "
                + "BEGIN OPEN r FOR SELECT n FROM generate_series(1, 5) n; RETURN r; END $$ LANGUAGE plpgsql");
            try (CallableStatement s = c.prepareCall("{? = call pg_temp.pointed()}")) {
                s.registerOutParameter(1, Types.REF_CURSOR);
                s.execute();
                all.add(rows((ResultSet) s.getObject(1)));
            }
            c.rollback();
            return all;
        }));

        behaviours.put("notices_and_notifications", () -> connected(c -> {
            Statement s = c.createStatement();
            s.execute("DO $$ BEGIN RAISE NOTICE 'noted' USING HINT = 'h'; RAISE WARNING 'warned'; END $$");
            List<Object> all = list();
            for (SQLWarning w = s.getWarnings(); w != null; w = w.getNextWarning()) all.add(diagnosis(w));
            PGConnection pg = c.unwrap(PGConnection.class);
            s.execute("LISTEN here");
            s.execute("NOTIFY here, 'own'");
            connected(other -> { execute(other, "SELECT pg_notify('here', 'żółć')"); return null; });
            List<PGNotification> heard = new ArrayList<>();
            while (heard.size() < 2) heard.addAll(List.of(Objects.requireNonNullElse(pg.getNotifications(1000), new PGNotification[0])));
            for (PGNotification n : heard) all.add(list(n.getName(), n.getParameter(), n.getPID() == pg.getBackendPID()));
            return all;
        }));

        behaviours.put("cancel", () -> connected(c -> {
            Statement s = c.createStatement();
            CompletableFuture<Object> result = CompletableFuture.supplyAsync(() -> fails(() -> s.execute("SELECT pg_sleep(60)")));
            String asleep = "SELECT state = 'active' AND query LIKE '%pg_sleep%' FROM pg_stat_activity WHERE pid = "
                + c.unwrap(PGConnection.class).getBackendPID();
            connected(other -> {
                while (!query(other, asleep).toString().equals("[[t]]")) Thread.sleep(5);
                return null;
            });
            s.cancel();
            List<Object> all = list(result.get(), query(c, "SELECT 1"));
            s.setQueryTimeout(1);
            all.add(fails(() -> s.execute("SELECT pg_sleep(60)")));
            all.add(query(c, "SELECT 2"));
            return all;
        }));

        behaviours.put("errors_in_full", () -> connected(c -> {
            execute(c, "CREATE TEMP TABLE t (id int PRIMARY KEY CHECK (id > 0), needed text NOT NULL)");
            execute(c, "INSERT INTO t VALUES (1, '')");
            List<Object> all = list();
            for (String sql : List.of("SELEC", "SELECT 'ż', absent", "INSERT INTO t VALUES (1, '')", "INSERT INTO t VALUES (-1, '')",
                "INSERT INTO t VALUES (2)", "SELECT * FROM absent", "SELECT 'x'::int", "SELECT 1/0", "DO $$ BEGIN PERFORM 1/0; END $$")) {
                all.add(fails(() -> execute(c, sql)));
            }
            all.add(fails(() -> { PreparedStatement p = c.prepareStatement("SELECT ?::int"); p.setString(1, "x"); p.executeQuery(); }));
            return all;
        }, "logServerErrorDetail", "true"));

        behaviours.put("two_phase_by_xa", () -> {
            connected(c -> { execute(c, "DROP TABLE IF EXISTS xa; CREATE TABLE xa (id int)"); return null; });
            PGXADataSource source = new PGXADataSource();
            source.setUrl("jdbc:postgresql://" + env.get("DRIVER_HOST") + ":" + env.get("DRIVER_PORT") + "/" + env.get("DRIVER_DBNAME") + "?sslmode=disable");
            source.setUser(env.get("DRIVER_USER"));
            source.setPassword(env.get("DRIVER_PASSWORD"));
            List<Object> all = list();
            var xa = source.getXAConnection();
            XAResource resource = xa.getXAResource();
            Connection c = xa.getConnection();
            for (boolean commits : new boolean[] {true, false}) {
                Xid xid = new BranchXid(commits ? "commits" : "rolls back");
                resource.start(xid, XAResource.TMNOFLAGS);
                execute(c, "INSERT INTO xa VALUES (1)");
                resource.end(xid, XAResource.TMSUCCESS);
                all.add(resource.prepare(xid));
                all.add(resource.recover(XAResource.TMSTARTRSCAN | XAResource.TMENDRSCAN).length);
                if (commits) resource.commit(xid, false); else resource.rollback(xid);
            }
            all.add(fails(() -> resource.commit(new BranchXid("absent"), false)));
            all.add(query(c, "SELECT count(*) FROM xa"));
            execute(c, "DROP TABLE xa");
            xa.close();
            return all;
        });

        behaviours.put("large_values", () -> connected(c -> {
            byte[] big = new byte[8 << 20];
            new Random(8).nextBytes(big);
            PreparedStatement p = c.prepareStatement("SELECT md5(?), ?::bytea");
            p.setBytes(1, big);
            p.setBytes(2, big);
            ResultSet r = p.executeQuery();
            r.next();
            StringBuilder digest = new StringBuilder();
            for (byte b : MessageDigest.getInstance("MD5").digest(big)) digest.append(String.format("%02x", b));
            return list(r.getString(1).contentEquals(digest), Arrays.equals(r.getBytes(2), big));
        }));

        behaviours.put("ended_by_the_server", () -> connected(c -> list(
            fails(() -> query(c, "SELECT pg_terminate_backend(pg_backend_pid())")), c.isClosed(), c.isValid(1))));

        behaviours.put("tls_connections", () -> {
            List<Object> all = list();
            for (String mode : List.of("disable", "allow", "prefer", "require", "verify-ca", "verify-full")) {
                for (String host : List.of("localhost", "127.0.0.1")) {
                    all.add(list(mode, host, attempt(() -> connected(c -> query(c, "SELECT length(repeat('t', 200000))"),
                        "sslmode", mode, "sslrootcert", env.get("DRIVER_TLS_ROOT"), "host", host))));
                }
            }
            return all;
        });
    }

    static Object attempt(Behaviour behaviour) {
        try {
            return behaviour.run();
        } catch (Exception e) {
            return diagnosis(e);
        }
    }

    static Object failsInBatch(Statement s) throws SQLException {
        try {
            return s.executeBatch();
        } catch (BatchUpdateException e) {
            return list(Arrays.toString(e.getUpdateCounts()), e.getSQLState(), diagnosis(e.getNextException()));
        }
    }

    static class BranchXid implements Xid {
        private final byte[] name;

        BranchXid(String name) { this.name = name.getBytes(StandardCharsets.UTF_8); }

        public int getFormatId() { return 7; }

        public byte[] getGlobalTransactionId() { return name; }

        public byte[] getBranchQualifier() { return new byte[] {1}; }

        // The driver puts it into its errors' texts.
        public String toString() { return new String(name, StandardCharsets.UTF_8); }
    }

    static String json(Object value) {
        if (value == null) return "null";
        if (value instanceof Boolean || value instanceof Integer || value instanceof Long) return value.toString();
        if (value instanceof Map) {
            StringJoiner joined = new StringJoiner(",", "{", "}");
            ((Map<?, ?>) value).forEach((name, item) -> joined.add(json(name.toString()) + ":" + json(item)));
            return joined.toString();
        }
        if (value instanceof Collection) {
            StringJoiner joined = new StringJoiner(",", "[", "]");
            for (Object item : (Collection<?>) value) joined.add(json(item));
            return joined.toString();
        }
        String text = value.toString().replaceAll("\\b" + env.get("DRIVER_PORT") + "\\b", "PORT").replaceAll("\\bpg_temp_\\d+", "pg_temp_N");
        StringBuilder quoted = new StringBuilder("\"");
        for (char character : text.toCharArray()) {
            if (character < 0x20 || character > 0x7e || character == '"' || character == '\\') {
                quoted.append(String.format("\\u%04x", (int) character));
            } else {
                quoted.append(character);
            }
        }
        return quoted.append('"').toString();
    }

    public static void main(String[] arguments) {
        for (var entry : behaviours.entrySet()) {
            String name = entry.getKey();
            if (name.startsWith("tls_") != env.containsKey("DRIVER_TLS_ROOT")) continue;
            if (env.containsKey("DRIVER_ONLY") && !name.contains(env.get("DRIVER_ONLY"))) continue;
            String line;
            try {
                line = "\"result\":" + json(entry.getValue().run());
            } catch (Throwable e) {
                StringWriter trace = new StringWriter();
                e.printStackTrace(new PrintWriter(trace));
                line = "\"unexpected\":" + json(trace);
            }
            System.out.println("{\"name\":" + json(name) + "," + line + "}");
        }
        System.exit(0);
    }
}
