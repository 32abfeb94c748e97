\set id random(1, :rows)
UPDATE existing_writers SET n = n + 1 WHERE id = :id;
